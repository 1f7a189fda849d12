"""Tensor parallelism between real worker processes, one of which is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seallmd.core import messages as msg
from seallmd.core.shapes import ModelShape
from seallmd.worker import host, main
from tests.worker.helpers import GREEDY, plain, plain_logits, save_tiny
from tests.worker.test_process import BLOCK_BYTES, Peer


class Processes:
    """A host process and two workers."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "rendezvous").mkdir()
        fields: dict[str, Any] = {
            "device": "cpu",
            "block_bytes": BLOCK_BYTES,
            "cache": str(tmp_path / "cache"),
            "rendezvous": str(tmp_path / "rendezvous"),
        }
        self.host = Peer(host.run, msg.WorkerSettings("host", **fields), msg.FromHost)
        self.workers = [
            Peer(main.run, msg.WorkerSettings(f"w{i}", arena_bytes=8 << 20, **fields), msg.FromWorker)
            for i in range(2)
        ]
        self.steps = 0
        for peer in (self.host, *self.workers):
            assert isinstance(peer.hear(), msg.Hello)

    def image(self, service: str, directory: Path, ranks: int) -> tuple[ModelShape, str]:
        """Probe and build; returns the shape and where the image is."""
        self.host.say(msg.Probe(service, str(directory), "auto", 0))
        probed = self.host.hear()
        self.host.say(msg.BuildImage(service, ranks=ranks))
        return probed.shape, self.host.hear().path

    def copy_in(
        self, service: str, directory: Path, segments: tuple[int, ...], image: str, first: int, ranks: int
    ) -> None:
        """On workers 0 .. ranks-1, from block `first` on."""
        for rank in range(ranks):
            at, block, extents = rank * sum(segments), first, []
            for size in segments:
                extents.append(msg.Extent(at, size, block * BLOCK_BYTES))
                at, block = at + size, block - (-size // BLOCK_BYTES)
            group = msg.Group(7, rank, ranks) if ranks > 1 else None
            copy = msg.CopyIn(service, str(directory), "float32", 256, image, tuple(extents), 1, group)
            self.workers[rank].say(copy)
        for worker in self.workers[:ranks]:
            assert isinstance(worker.hear(), msg.CopyDone)

    def step(self, service: str, tokens: list[int], run: int, block: int, workers: list[Peer]) -> None:
        """Send a step of one request to these workers: tokens[run:], the first of them with a new block."""
        self.steps += 1
        admit = (msg.Admit(block, tuple(tokens), len(tokens), GREEDY),) if run == 0 else ()
        row = msg.Row(block, run, len(tokens) - run, True, (block,) if run == 0 else ())
        for worker in workers:
            worker.say(msg.Step(self.steps, service, admit, (row,)))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    for peer in (running.host, *running.workers):
        peer.process.kill()
        peer.sock.close()


def test_a_rank_that_is_killed(processes: Processes, tmp_path: Path) -> None:
    """Two processes generate what one does; when one is killed in a step, the other says so, lives, and can
    end."""
    directory = save_tiny(tmp_path / "m", "gemma3_text", vocab_size=96)
    shape, image = processes.image("s", directory, ranks=2)
    processes.copy_in("s", directory, shape.shards[0].segments, image, 0, ranks=2)
    shape, image = processes.image("alone", directory, ranks=1)
    processes.copy_in("alone", directory, shape.segments, image, 40, ranks=1)

    model, tokens, run = plain(directory), [5, 9, 13, 21], 0
    for _ in range(6):
        processes.step("s", tokens, run, 100, processes.workers)
        first, second = (worker.hear() for worker in processes.workers)
        assert first.tokens == (int(plain_logits(model, tokens).argmax()),)
        assert second.tokens == ()
        run = len(tokens)
        tokens.append(first.tokens[0])

    survivor, victim = processes.workers
    processes.step("s", tokens, run, 100, [survivor])  # waits for the other in its first sum
    victim.process.kill()
    failed = survivor.hear()
    assert isinstance(failed, msg.StepFailed)
    assert "was lost" in failed.reason
    processes.step("alone", [5, 9], 0, 101, [survivor])
    assert survivor.hear().tokens == (int(plain_logits(model, [5, 9]).argmax()),)

    survivor.say(msg.CopyIn("other", str(directory), "float32", 256, image, (), 2, msg.Group(8, 0, 2)))
    survivor.say(msg.Shutdown())
    assert survivor.ended() == 0  # though a thread of it still waits for the other rank

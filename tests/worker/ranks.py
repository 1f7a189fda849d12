"""Several workers of one process as the ranks of a tensor-parallel group, each step in a thread per rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from seallmd.core import messages as msg
from seallmd.worker import attention
from tests.worker.helpers import BLOCK_BYTES, Rig, Talk, plain_logits


class _BackendPerThread(attention._Backend):
    """A process has one worker, hence one answerer at a time; here each thread is such a process."""

    _here = threading.local()

    @property  # type: ignore[override]
    def answerer(self) -> attention.Answerer | None:
        return getattr(self._here, "answerer", None)

    @answerer.setter
    def answerer(self, answerer: attention.Answerer | None) -> None:
        self._here.answerer = answerer


class Ranks:
    """`ranks` devices, one host, and services that are split over all of them. largest: difference of a
    logit from the plain model's so far."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int, blocks: int = 1024
    ) -> None:
        monkeypatch.setattr(attention._backend, "__class__", _BackendPerThread)
        self.rigs = [Rig(monkeypatch, tmp_path / "cache", blocks) for _ in range(ranks)]
        (tmp_path / "cache" / "rendezvous").mkdir(parents=True)
        self._threads = ThreadPoolExecutor(ranks, initializer=torch.set_num_threads, initargs=(1,))
        self.groups = 0
        self.largest = 0.0

    def each(self, call: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """One call per rank, side by side."""
        return list(self._threads.map(call, *arguments))

    def prepare(
        self, service: str, directory: Path, ranks: int | None = None, **fields: Any
    ) -> tuple[msg.Probed, str]:
        """Probe, and build the image for `ranks` (default: all); returns what `copy_in` needs."""
        ranks = ranks or len(self.rigs)
        probed = self.rigs[0].probe(service, directory, **fields)
        assert isinstance(probed, msg.Probed), probed
        shard = next(shard for shard in probed.shape.shards if shard.ranks == ranks)
        self.rigs[0].host.handle(msg.BuildImage(service, ranks=ranks))
        ready = self.rigs[0].take()
        assert isinstance(ready, msg.ImageReady), ready
        assert ready.bytes_ == ranks * sum(shard.segments)
        one = msgspec.structs.replace(probed.shape, layers=shard.layers, segments=shard.segments)
        return msgspec.structs.replace(probed, shape=one), ready.path

    def load(self, service: str, directory: Path, **fields: Any) -> None:
        """Bring the service in on all ranks."""
        self.copy_in(service, *self.prepare(service, directory, **fields))

    def copy_in(self, service: str, probed: msg.Probed, image: str) -> None:
        """Copy in, with a new group; all succeed."""
        self.groups += 1
        self.say_copy_in(service, probed, image, range(len(self.rigs)))
        for rig in self.rigs:
            while rig.worker.copying:
                rig.worker.advance()
            done = rig.take()
            assert isinstance(done, msg.CopyDone), done

    def say_copy_in(
        self,
        service: str,
        probed: msg.Probed,
        image: str,
        members: Sequence[int],
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Tell these devices to copy in and join the latest group. ranks: theirs, default: their numbers."""
        part, shape = probed.shape.weights_bytes, probed.shape
        for member, rank in zip(members, ranks or members, strict=True):
            rig, at, extents = self.rigs[member], rank * part, []
            rig.shapes[service] = shape
            for size in shape.segments:
                extents.append(msg.Extent(at, size, rig.take_run(-(-size // BLOCK_BYTES)) * BLOCK_BYTES))
                at += size
            group = msg.Group(self.groups, rank, len(self.rigs) if ranks is None else len(ranks))
            rig.sent[service] = msg.CopyIn(
                service,
                probed.directory,
                shape.dtype,
                shape.context,
                image,
                tuple(extents),
                self.groups,
                group,
            )
            rig.worker.handle(rig.sent[service])

    def evict(self, service: str) -> tuple[msg.Probed, str]:
        """Drop the weights on every rank; returns what `copy_in` needs."""
        backs = [rig.evict(service) for rig in self.rigs]
        return backs[0]

    def talks(self, request: int, service: str, prompt: list[int]) -> list[Talk]:
        """A request, as each rank's worker knows it: their blocks differ."""
        return [Talk(rig, request, service, prompt) for rig in self.rigs]

    def answers(self, work: list[tuple[list[Talk], int]]) -> list[Any]:
        """What the workers say to one step of (request, tokens), by rank."""
        admits: list[list[msg.Admit]] = [[] for _ in self.rigs]
        rows: list[list[msg.Row]] = [[] for _ in self.rigs]
        for talks, count in work:
            for rank, talk in enumerate(talks):
                admit, row = talk.row(count)
                admits[rank] += admit
                rows[rank].append(row)
        service = work[0][0][0].service
        return self.each(lambda rig, *step: rig.step(service, *step), self.rigs, admits, rows)

    def step(self, model: PreTrainedModel, work: list[tuple[list[Talk], int]]) -> None:
        """One step; rank 0 alone draws, and its logits and tokens are the plain model's."""
        sampling = [talks for talks, count in work if talks[0].run + count == len(talks[0].tokens)]
        done = self.answers(work)
        assert all(isinstance(answer, msg.StepDone) for answer in done), done
        assert [len(answer.tokens) for answer in done[1:]] == [0] * (len(self.rigs) - 1)
        drawn = self.rigs[0].logits if sampling else ()
        for talks, token, logits in zip(sampling, done[0].tokens, drawn, strict=True):
            expected = plain_logits(model, talks[0].tokens)
            self.largest = max(self.largest, float((logits - expected).abs().max()))
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
            assert token == int(expected.argmax())
            for talk in talks:
                talk.tokens.append(token)

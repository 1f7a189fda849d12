"""The real processes over real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.multiprocessing as mp

from seallmd.core import messages as msg
from seallmd.core.framing import Unframer, frame
from seallmd.worker import host, main
from seallmd.worker.channel import Channel, Closed
from seallmd.worker.image import Image
from seallmd.worker.image_cache import ImageCache
from seallmd.worker.probe import probe
from seallmd.worker.resolve import fetch
from tests.worker.helpers import GREEDY, plain, plain_logits, save_tiny

BLOCK_BYTES = 1 << 16


class Peer:
    """A spawned process and the daemon's end of its socket."""

    def __init__(self, entry: Callable[..., None], settings: msg.WorkerSettings, speaks: object) -> None:
        self.sock, theirs = socket.socketpair()
        self.process = mp.get_context("spawn").Process(
            target=entry, args=(msgspec.json.encode(settings), theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self._messages = self._receive(Unframer(speaks))

    def _receive(self, unframer: Unframer) -> Iterator[Any]:
        while data := self.sock.recv(1 << 16):
            yield from unframer.feed(data)

    def say(self, message: msg.Message) -> None:
        self.sock.sendall(frame(message))

    def hear(self) -> Any:
        """The next message that is not progress."""
        return next(m for m in self._messages if not isinstance(m, msg.JobProgress))

    def ended(self) -> int | None:
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[tuple[Peer, Peer]]:
    settings = {"device": "cpu", "block_bytes": BLOCK_BYTES, "cache": str(tmp_path / "cache")}
    keeper = msg.WorkerSettings("host", **settings, image_cache_bytes=64 << 20)
    pair = (
        Peer(host.run, keeper, msg.FromHost),
        Peer(main.run, msg.WorkerSettings("w0", arena_bytes=(8 << 20) + 5, **settings), msg.FromWorker),
    )
    yield pair
    for peer in pair:
        peer.process.kill()
        peer.sock.close()


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_end_to_end(peers: tuple[Peer, Peer], tmp_path: Path, cached: bool) -> None:
    """Hello, probe, image (built, or an earlier process's from the disk), copy, steps; then Shutdown ends one
    process, a closed socket the other."""
    directory = save_tiny(tmp_path / "m", "qwen3")
    images = _kept_image(directory, tmp_path / "cache" / "images") if cached else set()
    keeper, worker = peers
    hello = worker.hear()
    assert hello.pid == worker.process.pid
    assert hello.arena_bytes == 8 << 20
    assert keeper.hear() == msg.Hello(keeper.process.pid, "host", 0)

    keeper.say(msg.Probe("bad", str(tmp_path), "auto", 0))
    keeper.say(msg.Probe("gone", "/no/such/directory", "auto", 0))
    keeper.say(msg.Probe("s", str(directory), "auto", 0))
    heard = {m.service: m for m in (keeper.hear(), keeper.hear(), keeper.hear())}
    assert isinstance(heard["bad"], msg.ProbeFailed)
    assert isinstance(heard["gone"], msg.ProbeFailed)
    probed = heard["s"]
    keeper.say(msg.BuildImage("s"))
    ready = keeper.hear()
    assert ({os.stat(ready.path).st_ino} == images) == cached
    extents, image_at, block = [], 0, 3
    for size in probed.shape.segments:
        extents.append(msg.Extent(image_at, size, block * BLOCK_BYTES))
        image_at, block = image_at + size, block - (-size // BLOCK_BYTES) + 1
    worker.say(msg.CopyIn("s", probed.directory, "float32", 256, ready.path, tuple(extents), 8))
    done = worker.hear()
    assert (type(done), done.copy) == (msg.CopyDone, 8)

    tokens = [5, 9, 13, 21]
    worker.say(
        msg.Step(1, "s", (msg.Admit(4, tuple(tokens), 4, GREEDY),), (msg.Row(4, 0, 4, True, (block,)),))
    )
    for step in range(2, 6):  # sent before the tokens they run are known here
        worker.say(msg.Step(step, "s", (), (msg.Row(4, 2 + step, 1, True),)))
    tokens += [worker.hear().tokens[0] for _ in range(5)]
    model = plain(directory)
    assert tokens[4:] == [int(plain_logits(model, tokens[:n]).argmax()) for n in range(4, 9)]

    worker.say(msg.Shutdown())
    keeper.sock.shutdown(socket.SHUT_WR)
    assert (worker.ended(), keeper.ended()) == (0, 0)


def _kept_image(model: Path, directory: Path) -> set[int]:
    """Keep the model's image as a host process does; returns the inodes of the cached files."""
    cache = ImageCache(directory, 64 << 20, pytest.fail)
    image = Image("s", probe(model, "auto", 0), 1, lambda *_: None, cache)
    assert image.keeping is not None
    image.keeping.join()
    image.close()
    return {file.stat().st_ino for file in directory.glob("*.image")}


@pytest.mark.parametrize(("data", "defect"), [(b"", False), (b"\x03\x00\x00\x00abc", True)])
def test_channel_tells_an_end_from_a_defect(data: bytes, defect: bool) -> None:
    """The daemon closing its end is a quiet end; bytes that cannot be decoded are a defect."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs, msg.ToWorker)
        ours.sendall(frame(msg.Forget((1,))) + data)
        ours.shutdown(socket.SHUT_WR)
        channel._reader.join(10)
        with pytest.raises(Closed) as end:
            channel.get()
        assert isinstance(end.value.__cause__, ValueError) == defect


def test_damaged_gguf(tmp_path: Path) -> None:
    """A GGUF whose header lies is refused with a reason, and leaves nothing in the cache."""
    from seallmd.errors import ModelRefused

    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(ModelRefused, match=r"says that it has .* tensors"):
        fetch(str(tmp_path / "broken.gguf"), str(tmp_path / "cache"), lambda *_: None)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []

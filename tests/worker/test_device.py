"""How a CPU device keeps images, and how much of a step's time copies get."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import main
from seallmd.worker.cuda_device import CudaDevice, _LockedImage
from seallmd.worker.device import CHUNK_BYTES, CpuDevice, chunks

BLOCK = 1 << 12


class Counting(CpuDevice):
    """Counts mappings."""

    maps = 0

    def _map(self, path: str, size: int) -> torch.Tensor:
        self.maps += 1
        return super()._map(path, size)


def copied(device: CpuDevice, path: Path) -> int:
    """Copy a block from the image and return its first byte."""
    copy = device.copy_in("s", str(path), (msg.Extent(0, BLOCK, BLOCK),))
    while copy.advance():
        pass
    return int(device.arena[BLOCK])


def test_an_image_is_mapped_once(tmp_path: Path) -> None:
    """Until it is dropped, or another file lies where it was: page faults take as long as the copy itself."""
    device = Counting(msg.WorkerSettings("t", "cpu", 4 * BLOCK, block_bytes=BLOCK))
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(b"\1" * BLOCK)
    other.write_bytes(b"\2" * BLOCK)
    assert [copied(device, image) for _ in range(3)] == [1, 1, 1]
    assert device.maps == 1
    os.replace(other, image)
    assert [copied(device, image) for _ in range(2)] == [2, 2]
    assert device.maps == 2
    device.drop_image("s")
    device.drop_image("s")
    assert copied(device, image) == 2
    assert device.maps == 3


class Arriving:
    """A worker with pieces to copy, each of `piece` seconds, and a binding behind them."""

    def __init__(self, pieces: int, piece: float) -> None:
        self.now, self.pieces, self.done = 0.0, pieces, 0
        self._piece = piece

    @property
    def copying(self) -> bool:
        return self.done <= self.pieces

    @property
    def binding(self) -> bool:
        return self.done == self.pieces

    def advance(self) -> bool:
        self.now += self._piece
        self.done += 1
        return True


@pytest.mark.parametrize(
    ("pieces", "budget", "done"),
    [(100, 0.0, 1), (100, 3.5, 3), (100, 4.0, 4), (4, 99.0, 4), (0, 99.0, 1)],
)
def test_copies_keep_to_their_share(
    pieces: int, budget: float, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece at least, no piece that would go beyond the budget, and a binding only as the first thing."""
    worker = Arriving(pieces, 1.0)
    monkeypatch.setattr(main.time, "perf_counter", lambda: worker.now)
    assert main._copy_for(worker, budget)  # type: ignore[arg-type]
    assert worker.done == done


class Done:
    """A CUDA event."""

    def __init__(self, done: bool) -> None:
        self._done = done

    def query(self) -> bool:
        return self._done


@pytest.mark.parametrize(
    ("tables", "awaited"), [([(1, 9)], None), ([(9, 3), (8,)], 1), ([(2,), (4,)], 2), ([], None)]
)
def test_steps_wait_for_copies_of_their_own_blocks(
    tables: list[tuple[int, ...]], awaited: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: for the last copy of any of them, which is behind the others; and never for what is done."""
    waits: list[object] = []
    stream = type("Stream", (), {"wait_event": lambda _, event: waits.append(event)})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    device = object.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    events = [Done(True), Done(False), Done(False)]
    blocks = [frozenset({1}), frozenset({2, 3}), frozenset({4})]
    device._kv_copies = deque(zip(events, blocks, strict=True))  # type: ignore[arg-type]
    device.wait_for(tables)
    assert waits == ([] if awaited is None else [events[awaited]])
    assert len(device._kv_copies) == 2


class Locks:
    """Page locks that overlap nowhere, and are refused after so many."""

    def __init__(self, most: int = 1000) -> None:
        self.held: dict[int, int] = {}
        self._most = most

    def lock(self, memory: torch.Tensor) -> None:
        if len(self.held) >= self._most:
            raise RuntimeError("no more")
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        assert all(end <= other or other + size <= begin for other, size in self.held.items())
        self.held[begin] = memory.numel()

    def unlock(self, memory: torch.Tensor) -> None:
        assert self.held.pop(memory.data_ptr()) == memory.numel()


@pytest.mark.parametrize("most", [1000, 2, 0])
def test_an_image_is_page_locked_where_copies_get(most: int) -> None:
    """On a GPU: a chunk before it is copied from, each once, and no copy is from two of them; what the driver
    refuses to lock is copied all the same, and all that is locked is unlocked."""
    image = torch.arange(3 * CHUNK_BYTES + 700, dtype=torch.int32).to(torch.uint8)
    extents = (msg.Extent(256, CHUNK_BYTES, 0), msg.Extent(CHUNK_BYTES + 512, CHUNK_BYTES + 100, CHUNK_BYTES))
    locks = Locks(most)
    locked = _LockedImage(image, locks)
    for _ in range(2):
        for to, at, size in chunks(extents):
            assert at // CHUNK_BYTES == (at + size - 1) // CHUNK_BYTES
            extent = extents[to >= CHUNK_BYTES]
            assert torch.equal(locked.part(at, size), image[extent.image_at + to - extent.arena_at :][:size])
    assert len(locks.held) == min(most, 3)
    locked.unlock()
    assert not locks.held


def test_chunks_are_all_of_it() -> None:
    """Every byte of every extent, once, in order."""
    extents = (msg.Extent(256, 3 * CHUNK_BYTES, 7), msg.Extent(5 * CHUNK_BYTES, 1, 0), msg.Extent(9, 0, 3))
    found = list(chunks(extents))
    assert sum(size for _, _, size in found) == 3 * CHUNK_BYTES + 1
    assert found[0] == (7, 256, CHUNK_BYTES - 256)
    assert found[1] == (7 + CHUNK_BYTES - 256, CHUNK_BYTES, CHUNK_BYTES)
    assert found[-1] == (0, 5 * CHUNK_BYTES, 1)

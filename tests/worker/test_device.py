"""How a CPU device keeps images, and how much of a step's time copies get."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import main
from seallmd.worker.device import CpuDevice, CudaDevice

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

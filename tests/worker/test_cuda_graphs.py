"""What the recorder of CUDA graphs makes of errors and memory, with a stand-in for `torch.cuda`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seallmd.worker import cuda_graphs
from seallmd.worker.cuda_graphs import CudaRecorder
from seallmd.worker.graphs import Uncapturable


class Captured:
    """A graph."""


class FakeCuda:
    """Takes 100 bytes for each graph; `lost`: every call that waits for the device fails."""

    def __init__(self) -> None:
        self.free, self.cached, self.lost = 10_000, 50, False
        self.mode, self.modes, self.capturing = "default", list[str](), False
        self.CUDAGraph = Captured
        self.pools, self.filled, self.spoilt, self.stream = 0, set[int](), set[int](), "usual"
        self.asked, self.draws = list[weakref.ref[Any]](), True  # graphs whose capture failed; random numbers

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def Stream(self, _: Any) -> str:  # noqa: N802 - as torch names it
        return "capture"

    def current_stream(self, _: Any) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def mem_get_info(self, _: Any) -> tuple[int, int]:
        return self.free - self.cached, 10_000

    def empty_cache(self) -> None:
        self.cached = 0

    def synchronize(self, _: Any) -> None:
        if self.lost:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode
        self.modes.append(mode)

    @contextmanager
    def graph(self, graph: Any, pool: int, stream: str, capture_error_mode: str) -> Iterator[None]:
        """As torch's: a capture that fails leaves its stream in place, and its pool of no use; the allocator
        goes on asking the graph, and random numbers are not drawn before a capture ends well."""
        assert (stream, capture_error_mode) == ("capture", "thread_local")
        assert pool not in self.spoilt, "a capture has failed there"
        self.empty_cache()
        assert all(failed() is not None for failed in self.asked), "the allocator asks a graph that is gone"
        self.capturing, self.stream, self.draws = True, stream, False
        try:
            yield
        except RuntimeError:
            self.spoilt.add(pool)
            self.asked.append(weakref.ref(graph))
            raise
        finally:
            self.capturing = False
        self.stream, self.draws = "usual", True
        if pool in self.filled:
            self.free -= 100
        self.filled.add(pool)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    torch_of_module = SimpleNamespace(cuda=fake, device=torch.device, zeros=lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(cuda_graphs, "torch", torch_of_module)
    return fake


def test_a_capture_is_rehearsed(cuda: FakeCuda) -> None:
    """The function runs once where waiting for the device is an error, then it is captured; memory that was
    cached before is not counted for the graph, nor against it."""
    recorder, seen = CudaRecorder(torch.device("cuda")), list[tuple[str, bool]]()
    recorder.capture(lambda: seen.append((cuda.mode, cuda.capturing)))
    assert seen == [("error", False), ("default", True)]
    assert recorder.spent() == 100
    recorder.capture(lambda: None)
    assert recorder.spent() == 200


@pytest.mark.parametrize("when", ["rehearsal", "capture"])
def test_a_function_that_waits(cuda: FakeCuda, when: str) -> None:
    """It cannot be captured, and whatever runs next finds the usual mode."""

    def function() -> None:
        if cuda.capturing == (when == "capture"):
            raise RuntimeError("called a synchronizing CUDA operation")

    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(Uncapturable, match="synchronizing"):
        recorder.capture(function)
    assert (cuda.mode, cuda.stream, cuda.draws) == ("default", "usual", True)
    recorder.capture(lambda: None)
    assert cuda.pools == (2 if when == "capture" else 1)


def test_a_lost_device_is_no_mere_refusal(cuda: FakeCuda) -> None:
    """Only a new process helps then: the error must go through, or every later step would fail."""

    def function() -> None:
        cuda.lost = True
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        CudaRecorder(torch.device("cuda")).capture(function)

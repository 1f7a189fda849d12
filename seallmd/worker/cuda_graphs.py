"""Captures functions as CUDA graphs: the recorder of `graphs` on a GPU.

Owns capturing, the memory pool that all graphs of a process share, and what counts as "cannot be captured".
Must not know models. It has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from seallmd.worker.graphs import Graph, Uncapturable
from seallmd.worker.process import one_line


class CudaRecorder:
    """As `graphs.Recorder`. One pool: graphs run one after another, so they share memory for activations.

    The stream is the recorder's own: when a graph goes, torch may free what libraries keep for the stream
    that it was captured on.
    """

    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []  # kept as long as the process, see `_reopen`

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._spent = 0

    def spent(self) -> int:
        """As `Recorder.spent`, by what the driver has less of since."""
        return self._spent

    def capture(self, function: Callable[[], object]) -> Graph:
        """As `Recorder.capture`. Waits for the device; some tenths of a second."""
        graph, begun = torch.cuda.CUDAGraph(), False
        usual = torch.cuda.current_stream(self._device)
        try:
            self._rehearse(function)
            begun = True
            if self._pool is None:
                self._open_pool()
            free = torch.cuda.mem_get_info(self._device)[0]
            self._record(graph, function)
        except RuntimeError as error:  # out of memory and refused calls are RuntimeErrors too
            self._recover(usual)
            if begun:
                self._failed.append(graph)
                self._reopen(usual)
            raise Uncapturable(one_line(error)) from error
        self._spent += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return graph

    def _recover(self, usual: torch.cuda.Stream) -> None:
        torch.cuda.set_stream(usual)  # torch may leave its own in place
        torch.cuda.synchronize(self._device)  # raises where the CUDA context is lost

    def _reopen(self, usual: torch.cuda.Stream) -> None:
        """A pool for what comes behind a capture that failed: torch goes on asking the graph that failed
        whether the last one is recorded to, hence `_failed`. Until a capture ends well it also takes the
        device's random numbers for that graph's, and neither draws any nor replays other graphs: so one is
        made at once."""
        try:
            self._open_pool()
        except RuntimeError:  # whoever captures next tries again, and hears why
            self._failed.append(self._anchor)
            self._pool = None
            self._recover(usual)

    def _open_pool(self) -> None:
        """One that is never without a graph: torch refuses a pool whose last graph has gone, as long as
        anything lies in it (vllm#28426)."""
        self._pool, self._anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        number = torch.zeros(1, device=self._device)
        self._record(self._anchor, lambda: number.add_(1))

    def _record(self, graph: torch.cuda.CUDAGraph, function: Callable[[], object]) -> None:
        # thread_local: another thread may join an NCCL group meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()

    def _rehearse(self, function: Callable[[], object]) -> None:
        """Run it once where waiting for the device is an error, as in a capture, but one that harms nothing.

        Also compiles and loads whatever the capture will launch.
        """
        torch.cuda.synchronize(self._device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # as a capture does: what it frees would hide what the graph takes

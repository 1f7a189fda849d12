"""Captures functions as CUDA graphs: the recorder of `graphs` on a GPU.

Owns capturing, the memory pool that all graphs of a process share, and what counts as "cannot be captured".
Must not know models. It has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from seallmd.worker.graphs import Graph, Uncapturable
from seallmd.worker.process import one_line


class CudaRecorder:
    """As `graphs.Recorder`. One pool: graphs run one after another, so they share memory for activations."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._spent = 0

    def spent(self) -> int:
        """As `Recorder.spent`, by what the driver has less of since."""
        return self._spent

    def capture(self, function: Callable[[], object]) -> Graph:
        """As `Recorder.capture`. Waits for the device; some tenths of a second."""
        try:
            self._rehearse(function)
            free = torch.cuda.mem_get_info(self._device)[0]
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may join an NCCL group meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:  # out of memory and refused calls are RuntimeErrors too
            torch.cuda.synchronize(self._device)  # raises where the CUDA context is lost
            raise Uncapturable(one_line(error)) from error
        self._spent += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return graph

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

"""The worker process: one per device.

Owns start, the loop that alternates between messages and running copies, and the end. Must not know what
messages do.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from pathlib import Path

from seallmd.core.messages import Hello, Shutdown, ToWorker, WorkerSettings
from seallmd.worker import ops
from seallmd.worker.channel import Channel, Closed
from seallmd.worker.device import Device, open_device
from seallmd.worker.graphs import Recorder
from seallmd.worker.process import begin, log_line
from seallmd.worker.worker import Worker

_IMPORT_POLL_SECONDS = 0.005
_FLIGHT_POLL_SECONDS = 0.0001
_QUIET_SECONDS = 0.05  # without work, before a graph is captured ahead: the next step may be on its way
# Of a step's time, for copies beside it. Residents keep stepping; and with one piece a step, a copy of half a
# gigabyte beside steps of 0.1 s took 3 s.
_COPY_SHARE = 0.25


def run(settings_json: bytes, sock: socket.socket) -> None:
    """Serve until Shutdown or until the socket closes. Entry of a spawned process.

    settings_json: WorkerSettings. sock: this end of a blocking stream socket pair. A message that cannot be
    decoded, and a lost CUDA context, end the process with a traceback.
    """
    settings = begin(settings_json)
    _start_operations(settings)
    device = open_device(settings)
    recorder = _start_kernels(settings, device)
    channel = Channel(sock, ToWorker)
    label = f"{device.label}, {ops.summary()}"
    try:
        channel.send(Hello(os.getpid(), label, device.arena.numel()))
        worker = Worker(device, settings, channel.send, recorder)
        gc.freeze()  # libraries and all: a collection that looks at them takes 0.1 s, amid a step
        _serve(channel, worker)
    except Closed as end:
        if end.__cause__ is not None and not isinstance(end.__cause__, OSError):
            raise


def _start_operations(settings: WorkerSettings) -> None:
    if settings.device == "cpu" and settings.cache:
        say = log_line(settings.name)
        say(ops.start(Path(settings.cache), say))


def _start_kernels(settings: WorkerSettings, device: Device) -> Recorder | None:
    """What a GPU has instead of compiled operations; it must be open."""
    if device.torch_device.type != "cuda":
        return None
    from seallmd.worker.cuda_graphs import CudaRecorder

    if settings.kernels and settings.cache:
        ops.start_kernels(device.torch_device, Path(settings.cache), log_line(settings.name))
    return CudaRecorder(device.torch_device)


def _serve(channel: Channel, worker: Worker) -> None:
    progressed = True
    while True:
        message = channel.get(_patience(worker, progressed))
        if isinstance(message, Shutdown):
            worker.land()
            return
        started = time.perf_counter()
        if message is not None:
            worker.handle(message)
        elif worker.flying and worker.arrived():
            worker.land()
        elif not worker.flying and not worker.copying and not worker.copying_kv:
            worker.prepare()
        if worker.copying_kv:
            worker.tell_copied()
        share = _COPY_SHARE if worker.awaited else 0.0  # nobody waits for one that serves out of its image
        progressed = _copy_for(worker, share * (time.perf_counter() - started))


def _patience(worker: Worker, progressed: bool) -> float | None:
    """How long to wait for a message before there is something else to do, None for ever."""
    if worker.copying and progressed:
        return 0
    if worker.flying:
        return 0 if worker.arrived() else _FLIGHT_POLL_SECONDS
    if worker.copying_kv:
        return _FLIGHT_POLL_SECONDS
    if worker.copying:
        return _IMPORT_POLL_SECONDS
    return _QUIET_SECONDS if worker.unprepared else None


def _copy_for(worker: Worker, seconds: float) -> bool:
    """Get on with a copy for so long as a further piece likely fits, one piece at least; then it may bind.

    False when nothing could be done.
    """
    begun = last = time.perf_counter()
    progressed = worker.copying and worker.advance()
    while progressed and worker.copying and not worker.binding:
        now = time.perf_counter()
        if now + (now - last) > begun + seconds:
            break
        last = now
        progressed = worker.advance()
    return progressed

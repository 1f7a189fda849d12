"""The worker process: one per device.

Owns start, the loop that alternates between messages and running copies, and the end. Must not know what
messages do.
"""

from __future__ import annotations

import os
import socket

from seallmd.core.messages import Hello, Shutdown, ToWorker
from seallmd.worker.channel import Channel, Closed
from seallmd.worker.device import open_device
from seallmd.worker.process import begin
from seallmd.worker.worker import Worker

_IMPORT_POLL_SECONDS = 0.005


def run(settings_json: bytes, sock: socket.socket) -> None:
    """Serve until Shutdown or until the socket closes. Entry of a spawned process.

    settings_json: WorkerSettings. sock: this end of a blocking stream socket pair. A message that cannot be
    decoded, and a lost CUDA context, end the process with a traceback.
    """
    settings = begin(settings_json)
    device = open_device(settings)
    channel = Channel(sock, ToWorker)
    try:
        channel.send(Hello(os.getpid(), device.label, device.arena.numel()))
        _serve(channel, Worker(device, settings.block_bytes, channel.send))
    except Closed as end:
        if end.__cause__ is not None and not isinstance(end.__cause__, OSError):
            raise


def _serve(channel: Channel, worker: Worker) -> None:
    progressed = True
    while True:
        wait = 0 if progressed else _IMPORT_POLL_SECONDS
        message = channel.get(wait if worker.copying else None)
        if isinstance(message, Shutdown):
            return
        if message is not None:
            worker.handle(message)
        # One piece of a copy per message: residents keep stepping, and the copy gets on under any load.
        progressed = worker.copying and worker.advance()

"""The daemon's end of the fork server, the process from which all its children come.

Owns that process: it is started when asked for, and again when it died. Must not know what the children are
for, nor when one is wanted again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from seallmd.core.forks import MAX_PACKET_BYTES, Exited, Fork, Kill, Kind, ToForkServer
from seallmd.core.messages import WorkerSettings

log = logging.getLogger(__name__)

OOM_SCORE = 500  # when memory runs out, the kernel takes a child, which is started again, and not the daemon

# torch's own threads (OpenMP) would spin for work after each of its operations, on the cores that those of
# the compiled operations want next (docs/log.md). CUDA counts GPUs in the order of their buses, as NVML does,
# and not the fastest first. Who has set it otherwise is heard.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

_DECODER = msgspec.msgpack.Decoder(Exited)


class ForkServer:
    """Forks children. Its process starts with `start` or with the first child, and ends with the thread that
    started it.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._children: dict[int, Callable[[str], None]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Have it import what children need; returns at once. Needs no event loop."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        number = theirs.fileno()
        command = [sys.executable, "-m", "seallmd.worker.forkserver", str(number), str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[number], env=_ENVIRONMENT | os.environ
        )
        theirs.close()
        self._sock = ours
        _prefer_for_oom(self._process.pid)

    def fork(
        self,
        kind: Kind,
        settings: WorkerSettings,
        sock: socket.socket,
        exited: Callable[[str], None],
    ) -> int:
        """Fork a child, as soon as everything is imported; returns its number, for `kill`.

        sock: its end of the socket to the daemon; may be closed when this returns. exited: called once with
        the reason, later.
        """
        if self._process is None:
            self.start()
        assert self._sock is not None
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._sock, self._on_readable)
        child = next(self._numbers)
        self._children[child] = exited
        self._say(Fork(child, kind, settings), [sock.fileno()])
        return child

    def kill(self, child: int) -> None:
        """End a child with SIGKILL; nothing happens when it is gone."""
        if child in self._children:
            self._say(Kill(child))

    def close(self) -> None:
        """End the process, and with it all children that are left. Nobody is told."""
        self._children.clear()
        if self._process is not None:
            self._process.kill()
            self._forget()

    def _say(self, message: ToForkServer, descriptors: list[int] | None = None) -> None:
        assert self._sock is not None
        try:
            socket.send_fds(self._sock, [msgspec.msgpack.encode(message)], descriptors or [])
        except OSError as error:
            # It is gone, which is read next, or takes nothing any more: then it has to go.
            log.warning("the fork server does not listen: %s", error)
            assert self._process is not None
            self._process.kill()

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            packet = self._sock.recv(MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self._on_end()
            return
        end = _DECODER.decode(packet)
        self._children.pop(end.child)(exit_text(end.code))

    def _on_end(self) -> None:
        """The process is gone, and so are all children: the kernel ends them with it."""
        reason = f"its fork server is gone ({exit_text(self._forget())})"
        children, self._children = self._children, {}
        for exited in children.values():
            exited(reason)

    def _forget(self) -> int:
        """Clean up behind the process, which is ending; returns its exit code."""
        assert self._process is not None
        assert self._sock is not None
        if self._loop is not None:
            self._loop.remove_reader(self._sock)
        self._sock.close()
        code = self._process.wait()
        self._process = self._sock = self._loop = None
        return code


def _prefer_for_oom(pid: int) -> None:
    """Let the kernel take this process or a child of it first when memory runs out."""
    with contextlib.suppress(OSError):  # gone already, or a /proc that may not be written: not needed
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))


def exit_text(code: int) -> str:
    """A process's end in words. code: as in `subprocess`."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"

"""The fork server: children are born, die by order, and are missed; what it imports leaves it fit to fork."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from seallmd.core import forks
from seallmd.core import messages as msg
from seallmd.core.framing import Unframer
from seallmd.runtime.forkserver import ForkServer
from seallmd.worker import forkserver as worker_side

SECONDS = 120  # for an import on a busy machine


class Born:
    """A forked host process, the daemon's end of its socket, and what was said of its end."""

    def __init__(self, forkserver: ForkServer, cache: Path) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        settings = msg.WorkerSettings("host", "cpu", cache=str(cache))
        self.number = forkserver.fork("host", settings, theirs, self.end.set_result)
        theirs.close()

    async def pid(self) -> int:
        """What it says when it is ready."""
        loop, unframer = asyncio.get_running_loop(), Unframer(msg.FromHost)
        while data := await asyncio.wait_for(loop.sock_recv(self.sock, 4096), SECONDS):
            for hello in unframer.feed(data):
                assert isinstance(hello, msg.Hello)
                return hello.pid
        raise AssertionError("it ended without a word")


@pytest.fixture
async def forkserver() -> AsyncIterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


async def test_children_are_born_and_missed(forkserver: ForkServer, tmp_path: Path) -> None:
    """One that is killed is missed alone; with the fork server all are, none stays, and more can be born."""
    one, other = Born(forkserver, tmp_path), Born(forkserver, tmp_path)
    with one.sock, other.sock:
        pids = [await one.pid(), await other.pid()]
        forkserver.kill(one.number)
        assert await asyncio.wait_for(one.end, SECONDS) == "killed by SIGKILL"
        assert not other.end.done()

        server = psutil.Process(pids[1]).parent()
        assert server is not None
        assert server.ppid() == os.getpid()
        assert server.environ()["OMP_WAIT_POLICY"] == "passive", "torch's threads would spin on others' cores"
        forgotten = psutil.Process(pids[1])
        server.send_signal(signal.SIGKILL)
        assert await asyncio.wait_for(other.end, SECONDS) == "its fork server is gone (killed by SIGKILL)"
        assert psutil.wait_procs([forgotten], timeout=10)[1] == []

    again = Born(forkserver, tmp_path)
    with again.sock:
        assert await again.pid() not in pids


def test_what_is_imported_can_be_forked() -> None:
    """No second thread and no CUDA context: a child would have neither, and hang or fail at its first use."""
    program = """
import os, sys
from seallmd.worker.forkserver import preload
preload()
threads, cuda = len(os.listdir("/proc/self/task")), sys.modules["torch"].cuda
print(threads, cuda.is_initialized(), "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "True"]


def test_what_cannot_be_forked_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for one more process: the fork server's own end would be that of all its children."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child, end = socket.socketpair()

    def full() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with ours, theirs, child, end:
        server = worker_side.ForkServer(theirs)
        fork = forks.Fork(7, "worker", msg.WorkerSettings("cpu0", "cpu"))
        socket.send_fds(ours, [msgspec.msgpack.encode(fork)], [end.fileno()])
        end.close()
        assert server._receive()
        assert msgspec.msgpack.decode(ours.recv(4096), type=forks.Exited) == forks.Exited(7, os.EX_OSERR)
        assert child.recv(1) == b"", "its descriptor stays open nowhere"

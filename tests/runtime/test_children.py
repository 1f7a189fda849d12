"""A child process as the daemon sees it, with a fork server that forks nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from seallmd.core import messages as msg
from seallmd.runtime.children import Child


class Fake:
    """As `ForkServer`: keeps the child's end of the socket."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self.kills = asyncio.Event()

    def fork(self, _kind: str, _settings: object, sock: socket.socket, exited: Callable[[str], None]) -> int:
        self.sock, self.exited = sock.dup(), exited
        return 7

    def kill(self, number: int) -> None:
        self.killed.append(number)
        self.kills.set()


async def begin(fake: Any, on_exit: Callable[[str], None]) -> Child:
    settings = msg.WorkerSettings("cpu0", "cpu")
    child = Child(fake, "worker", settings, msg.FromWorker, lambda _: None, on_exit)
    await child.start()
    return child


async def test_who_was_asked_to_end_may_close_its_socket_first(caplog: pytest.LogCaptureFixture) -> None:
    """An end in order is neither killed nor warned of, though the socket goes before the process does."""
    fake, ends = Fake(), list[str]()
    child = await begin(fake, ends.append)
    stopping = asyncio.create_task(child.stop(60))
    loop = asyncio.get_running_loop()
    fake.sock.setblocking(False)
    assert await loop.sock_recv(fake.sock, 4096), "it is asked"
    fake.sock.close()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not stopping.done()
    fake.exited("exit code 0")
    await stopping
    assert (fake.killed, ends, caplog.messages) == ([], [], [])


async def test_who_closes_its_socket_unasked_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    """A process that can say nothing more is of no use."""
    fake, ends = Fake(), asyncio.Queue[str]()
    _child = await begin(fake, ends.put_nowait)
    fake.sock.close()
    await fake.kills.wait()
    fake.exited("killed by SIGKILL")
    assert await ends.get() == "killed by SIGKILL"
    assert fake.killed == [7]
    assert caplog.messages == ["cpu0: closed its socket"]

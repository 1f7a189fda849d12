"""A child that hangs is killed once, and one that no kill ends is reported as stuck."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest

from seallmd.core import messages as msg
from seallmd.runtime import supervised as supervised_module
from seallmd.runtime.supervised import Supervised

STEP = msg.Step(1, "a", (), ())


class Immortal:
    """A child process that a driver holds: it does nothing any more, and does not die either."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.sent: list[msg.Message] = []
        self.exit: Callable[[str], None] = lambda _: None
        self.message: Callable[[msg.Message], None] = lambda _: None

    async def start(self) -> None:
        self.message(msg.Hello(1, "cpu", 0))

    def send(self, message: msg.Message) -> None:
        self.sent.append(message)

    def broken(self, reason: str) -> None:
        self.killed.append(reason)

    async def stop(self, grace_seconds: float) -> None:
        pass


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_a_child_that_no_kill_ends_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then systemd's watchdog is not told any more; when it dies after all, the reason says that it hung."""
    clock, child, lost = Clock(), Immortal(), list[str]()
    monkeypatch.setattr(supervised_module, "time", clock)

    def make(on_message: Callable[[msg.Message], None], on_exit: Callable[[str], None]) -> Immortal:
        child.message, child.exit = on_message, on_exit
        return child

    supervised = Supervised(make, up=lambda _: None, lost=lost.append, said=lambda _: None)  # type: ignore[arg-type]
    supervised.pulse.limit_seconds = 10.0
    await supervised.start()
    supervised.send(STEP)
    clock.now = 11.0
    supervised.look()
    assert child.killed == []
    supervised.look()
    assert len(child.killed) == 1
    assert not supervised.stuck
    supervised.look()
    assert supervised.stuck
    assert len(child.killed) == 1, "the log would be full of it"
    child.exit("killed by SIGKILL")
    assert not supervised.stuck
    assert lost == ["hung: owes an answer (step) and said nothing for 11 s, killed by SIGKILL"]
    await supervised.stop()


async def test_an_idle_child_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked after a while; its answer is nobody else's business, and its silence is its end."""
    clock, child, said = Clock(), Immortal(), list[msg.Message]()
    monkeypatch.setattr(supervised_module, "time", clock)

    def make(on_message: Callable[[msg.Message], None], on_exit: Callable[[str], None]) -> Immortal:
        child.message, child.exit = on_message, on_exit
        return child

    supervised = Supervised(make, up=lambda _: None, lost=lambda _: None, said=said.append)  # type: ignore[arg-type]
    supervised.pulse.limit_seconds = 10.0
    await supervised.start()
    supervised.look()
    assert child.sent == []
    clock.now = 6.0
    supervised.look()
    assert child.sent == [msg.Ping()]
    child.message(msg.Pong())
    assert said == []
    clock.now = 12.0
    supervised.look()
    assert len(child.sent) == 2
    for clock.now in (23.0, 24.0):
        supervised.look()
    assert "ping" in child.killed[0]
    await supervised.stop()


async def test_a_start_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Clients may hold every descriptor when a worker dies; its device must not be gone for good."""
    starts, up = list[int](), asyncio.Event()

    class Poor(Immortal):
        async def start(self) -> None:
            starts.append(1)
            if len(starts) == 2:
                raise OSError(errno.EMFILE, "Too many open files")
            await super().start()

    child = Poor()

    def make(on_message: Callable[[msg.Message], None], on_exit: Callable[[str], None]) -> Immortal:
        child.message, child.exit = on_message, on_exit
        return child

    supervised = Supervised(make, up=lambda _: up.set(), lost=lambda _: None, said=lambda _: None)  # type: ignore[arg-type]
    await supervised.start()
    supervised._pause = 0.0
    up.clear()
    child.exit("killed by SIGKILL")
    await asyncio.wait_for(up.wait(), 60)
    assert len(starts) == 3
    assert "cannot be started ([Errno 24] Too many open files)" in caplog.text
    await supervised.stop()

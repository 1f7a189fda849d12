"""A child process that is kept alive.

Owns when a dead or hung child is started again. Must not know what children do, nor the node.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from seallmd.core import messages as msg
from seallmd.runtime.children import Child
from seallmd.runtime.pulse import Pulse

log = logging.getLogger(__name__)

RESTART_SECONDS = 0.5  # the first pause before a dead child is started again
SETTLED_SECONDS = 60.0  # a child that lived this long has proved itself: the next pause is the first again
STOP_GRACE_SECONDS = 5.0


class Supervised:
    """A child that is started again when it dies, after a pause that doubles while it keeps dying.

    make: builds a Child from its two callbacks. up, lost, said: what to tell the node.
    """

    def __init__(
        self,
        make: Callable[[Callable[[msg.Message], None], Callable[[str], None]], Child],
        up: Callable[[msg.Hello], None],
        lost: Callable[[str], None],
        said: Callable[[msg.Message], None],
    ) -> None:
        self._make = make
        self._up = up
        self._lost = lost
        self._said = said
        self._child: Child | None = None
        self.pulse = Pulse(limit_seconds=120.0)
        self.longest_pause = 30.0
        self.stuck = False
        self._killed = ""  # why we did
        self._pause = RESTART_SECONDS
        self._started = 0.0
        self._is_up = False
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process."""
        self._started = time.monotonic()
        self.pulse.started(self._started)
        self._child = self._make(self._on_message, self._on_exit)
        await self._child.start()

    def send(self, message: msg.Message, expects: float = 0.0) -> None:
        """Send a message, if the process is there. expects: seconds until its answer, 0 = unknown."""
        if self._child is not None:
            self.pulse.sent(message, time.monotonic(), expects)
            self._child.send(message)

    def look(self) -> None:
        """Kill the process if it hangs."""
        if self._child is not None and (reason := self.pulse.look(time.monotonic())):
            if self._killed:  # at an earlier look, and still there
                self.stuck = True
            else:
                self._killed = reason
                self._child.broken(reason)
        elif self._is_up and self.pulse.wants_ping(time.monotonic()):
            self.send(msg.Ping())

    async def stop(self) -> None:
        """End the process for good."""
        if self._restart is not None:
            self._restart.cancel()
        if self._child is not None:
            # One that is still starting holds nothing, and would not hear until it is up.
            await self._child.stop(STOP_GRACE_SECONDS if self._is_up else 0.0)

    def _on_message(self, message: msg.Message) -> None:
        self.pulse.heard(message, time.monotonic())
        if isinstance(message, msg.Hello):
            self._is_up = True
            self._up(message)
        elif not isinstance(message, msg.Pong):
            self._said(message)

    def _on_exit(self, reason: str) -> None:
        self._child = None
        reason = f"{self._killed}, {reason}" if self._killed else reason
        self.stuck, self._killed = False, ""
        if time.monotonic() - self._started > SETTLED_SECONDS:
            self._pause = RESTART_SECONDS
        log.warning("a child process is gone (%s); starting another in %.1f s", reason, self._pause)
        self._is_up = False
        self._lost(reason)
        self._restart = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        while self._child is None:
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, self.longest_pause)
            try:
                await self.start()
            except OSError as error:  # no descriptor or no memory is left: clients may give some back
                self._child = None
                log.error("a child process cannot be started (%s); again in %.1f s", error, self._pause)

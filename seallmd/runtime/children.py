"""The daemon's child processes: started, spoken to, watched, ended.

Owns the framed socket and the notice of a child's death; children come from `forkserver`. Must not know what
the messages mean, nor when to restart: `supervised` does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import msgspec

from seallmd.core.forks import Kind
from seallmd.core.framing import Unframer, frame
from seallmd.core.messages import Message, Shutdown, WorkerSettings
from seallmd.runtime.forkserver import ForkServer

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 1.0  # until a dead child's socket has to be at its end; a process of its own may hold it


class Child:
    """One process at the other end of a socket pair.

    speaks: the union of messages it may send. on_message: called for each. on_exit: called once, with a
    reason, when the process is gone or its socket is; never after `stop`.
    """

    def __init__(
        self,
        forkserver: ForkServer,
        kind: Kind,
        settings: WorkerSettings,
        speaks: object,
        on_message: Callable[[Message], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self._forkserver = forkserver
        self._kind = kind
        self._settings = settings
        self._speaks = speaks
        self._on_message = on_message
        self._on_exit: Callable[[str], None] | None = on_exit
        self._transport: asyncio.WriteTransport | None = None
        self._gone = asyncio.Event()
        self._reason = ""
        self._last_words: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Have the process forked; it says Hello when it is ready."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._number = self._forkserver.fork(self._kind, self._settings, theirs, self._on_exited)
        theirs.close()
        self._transport, _ = await loop.create_connection(lambda: _Wire(self, self._speaks), sock=ours)

    def send(self, message: Message) -> None:
        """Send a message; silently nothing once the process is gone (its loss is reported elsewhere)."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def received(self, message: Message) -> None:
        """A message came."""
        self._on_message(message)

    def broken(self, reason: str) -> None:
        """The process is of no use any more (nor is it when its socket is not): kill it.

        One that was asked to end closes its socket before it is gone, and gets its time.
        """
        if self._on_exit is None:
            return
        if not self._gone.is_set():
            log.warning("%s: %s", self._settings.name, reason)
            self._forkserver.kill(self._number)
        elif self._last_words is not None:
            self._end()

    def _on_exited(self, reason: str) -> None:
        self._reason = reason
        self._gone.set()
        # What it said last is read before its end is told: who died of what depends on that.
        if self._transport is None or self._transport.is_closing():
            self._end()
        else:
            loop = asyncio.get_running_loop()
            self._last_words = loop.call_later(LAST_WORDS_SECONDS, self._end)

    def _end(self) -> None:
        if self._last_words is not None:
            self._last_words.cancel()
        if self._transport is not None:
            self._transport.close()
        if self._on_exit is not None:
            on_exit, self._on_exit = self._on_exit, None
            on_exit(self._reason)

    async def stop(self, grace_seconds: float) -> None:
        """Ask the process to end; kill it when it does not within the grace.

        0: kill it, and do not wait. It may not even be forked yet, and the kernel ends what the fork server
        leaves behind.
        """
        self._on_exit = None
        if not grace_seconds:
            self._forkserver.kill(self._number)
            self._gone.set()
            self._end()
            return
        self.send(Shutdown())
        try:
            await asyncio.wait_for(self._gone.wait(), grace_seconds)
        except TimeoutError:
            log.warning("%s did not stop within %.0f s: killed", self._settings.name, grace_seconds)
            self._forkserver.kill(self._number)
            await self._gone.wait()
        self._end()


class _Wire(asyncio.Protocol):
    """Bytes of the socket to messages."""

    def __init__(self, child: Child, speaks: object) -> None:
        self._child = child
        self._unframer = Unframer(speaks)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unframer.feed(data):
                self._child.received(message)
        except (msgspec.DecodeError, ValueError) as error:
            self._child.broken(f"spoke nonsense: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._child.broken("closed its socket" if exc is None else str(exc))

"""The daemon's child processes: started, spoken to, watched, ended.

Owns spawning (torch.multiprocessing, spawn), the framed socket, and the notice of a child's death. Must not
know what the messages mean, nor when to restart: `engine` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch.multiprocessing as mp

from seallmd.core.framing import Unframer, frame
from seallmd.core.messages import Message, Shutdown, WorkerSettings

log = logging.getLogger(__name__)

Entry = Callable[[bytes, socket.socket], None]

LAST_WORDS_SECONDS = 1.0  # until a dead child's socket has to be at its end; a process of its own may hold it
OOM_SCORE = 500  # when memory runs out, the kernel takes a child, which is started again, and not the daemon


def run_worker(settings: bytes, sock: socket.socket) -> None:
    """Entry of a worker process. Imported there, so that the daemon does without what only workers need."""
    from seallmd.worker.main import run

    run(settings, sock)


def run_host(settings: bytes, sock: socket.socket) -> None:
    """Entry of the host process."""
    from seallmd.worker.host import run

    run(settings, sock)


class Child:
    """One process at the other end of a socket pair.

    speaks: the union of messages it may send. on_message: called for each. on_exit: called once, with a
    reason, when the process is gone or its socket is; never after `stop`.
    """

    def __init__(
        self,
        entry: Entry,
        settings: WorkerSettings,
        speaks: object,
        on_message: Callable[[Message], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self._entry = entry
        self._settings = settings
        self._speaks = speaks
        self._on_message = on_message
        self._on_exit: Callable[[str], None] | None = on_exit
        self._transport: asyncio.WriteTransport | None = None
        self._gone = asyncio.Event()
        self._reason = ""
        self._last_words: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Start the process; it says Hello when it is ready."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._process = mp.get_context("spawn").Process(
            target=self._entry,
            args=(msgspec.json.encode(self._settings), theirs),
            name=f"seallmd-{self._settings.name}",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        _prefer_for_oom(self._process.pid)
        loop.add_reader(self._process.sentinel, self._on_sentinel)
        self._transport, _ = await loop.create_connection(lambda: _Wire(self, self._speaks), sock=ours)

    def send(self, message: Message) -> None:
        """Send a message; silently nothing once the process is gone (its loss is reported elsewhere)."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def received(self, message: Message) -> None:
        """A message came."""
        self._on_message(message)

    def broken(self, reason: str) -> None:
        """The process is of no use any more (nor is it when its socket is not): kill it."""
        if not self._gone.is_set():
            log.warning("%s: %s", self._settings.name, reason)
            self._process.kill()
        elif self._last_words is not None:
            self._end()

    def _on_sentinel(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        self._process.join()
        self._reason = _exit_text(self._process.exitcode)
        self._process.close()
        self._gone.set()
        # What it said last is read before its end is told: who died of what depends on that.
        if self._transport is None or self._transport.is_closing():
            self._end()
        else:
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
        """Ask the process to end; kill it when it does not within the grace (0: at once)."""
        self._on_exit = None
        self.send(Shutdown())
        try:
            await asyncio.wait_for(self._gone.wait(), grace_seconds)
        except TimeoutError:
            if grace_seconds:
                log.warning("%s did not stop within %.0f s: killed", self._settings.name, grace_seconds)
            self._process.kill()
            await self._gone.wait()
        self._end()


def _prefer_for_oom(pid: int | None) -> None:
    """Let the kernel take this child first when memory runs out."""
    with contextlib.suppress(OSError):  # gone already, or a /proc that may not be written: not needed
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


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

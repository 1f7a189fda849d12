"""The control socket: operators' commands over a Unix socket.

Owns who may speak, and that every command is answered. Must not know what is said (`control_schema`) beyond
whom to hand it to, nor how commands are carried out (`EngineFace` does that).

A connection may carry several commands, one after the other. What a command has begun goes on when its client
hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from seallmd import __version__
from seallmd.api.batch.operator import BatchOperator
from seallmd.api.control_schema import (
    About,
    Batches,
    BatchList,
    Cancel,
    Command,
    Detail,
    Drain,
    Event,
    Events,
    Evict,
    Failed,
    Load,
    Map,
    Ok,
    Picture,
    Pin,
    Plan,
    PlanReport,
    Progress,
    Reload,
    Reloaded,
    Reply,
    Report,
    RequestList,
    Requests,
    Show,
    Status,
)
from seallmd.api.latency_window import Figures
from seallmd.api.sockets import claim_socket_path
from seallmd.core.events import (
    DeviceDrainWanted,
    NodeDrainWanted,
    OperatorEvent,
    PinWanted,
    ServiceDrainWanted,
)
from seallmd.errors import ConfigError, ControlError
from seallmd.paths import make_socket_directory
from seallmd.runtime.face import EngineFace

_log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 16
MAX_MESSAGE_CHARACTERS = 400
PROGRESS_SECONDS = 0.25
LINGER_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")


Reloader = Callable[[], tuple[list[str], list[str]]]


class ControlServer:
    """Serves the control socket from `start` to `close`.

    http: where HTTP is served, for those who ask; to be set once it is known. reload: reads the configuration
    again; returns what changed and what needs a restart, raises ConfigError and then has changed nothing.
    latencies: of late, by service.
    """

    def __init__(
        self, engine: EngineFace, path: Path, *, group: str = "", listener: socket.socket | None = None
    ) -> None:
        """group: its members may speak too, beside this user and root. Empty: nobody else.

        listener: a socket that is open already (socket activation), instead of one at `path`; whoever opened
        it set its mode and removes it.
        """
        self.http: tuple[str, ...] = ()
        self.reload: Reloader | None = None
        self.batches: BatchOperator | None = None
        self.latencies: Callable[[], dict[str, Figures]] = dict
        self._engine = engine
        self._path = path
        self._group = group
        self._inherited = listener
        self._gid: int | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Ok | Failed]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Take the path and listen. Raises ControlError."""
        self._gid = _group_id(self._group) if self._group else None
        listener = self._inherited or self._listen()
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_LINE_BYTES)

    async def close(self) -> None:
        """Hang up, stop waiting for commands and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._inherited is None:
            self._path.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        make_socket_directory(self._path.parent)
        claim_socket_path(self._path)
        try:
            return self._bind()
        except OSError as error:
            raise ControlError(f"{self._path} cannot be used: {error.strerror or error}") from error

    def _bind(self) -> socket.socket:
        """The rights are set before anyone can connect, without touching the process's umask."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(self._path))
            if self._gid is not None:
                os.chown(self._path, -1, self._gid)
            self._path.chmod(0o600 if self._gid is None else 0o660)
        except OSError:
            listener.close()
            raise
        return listener  # not listening yet: start_unix_server does that

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._may_speak(writer):
                await self._converse(reader, writer)
            else:
                await _say(writer, Failed("permission denied: this is for the daemon's user and root"))
            await _linger(reader, writer)
        except ConnectionError:
            pass  # the client hung up
        finally:
            self._writers.discard(writer)
            writer.close()

    def _may_speak(self, writer: asyncio.StreamWriter) -> bool:
        """The file's mode keeps others out already; this holds where a mode was changed."""
        peer = writer.get_extra_info("socket")
        packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _pid, uid, gid = _CREDENTIALS.unpack(packed)
        return may_speak(uid, gid, self._gid)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = msgspec.json.Decoder(Command)
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # the line is longer than the reader's limit
                await _say(writer, Failed(f"a command may have {MAX_LINE_BYTES} bytes"))
                return
            if not line:
                return
            try:
                request = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                await _say(writer, Failed(f"this command is not understood: {error}"[:200]))
                continue
            await self._carry_out(request, reader, writer)

    async def _carry_out(
        self, request: Command, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match request:
            case Status():
                about = About(__version__, os.getpid(), self.http)
                await _say(writer, Report(self._engine.status(), about))
            case Map(cells):
                await _say(writer, Picture(self._engine.arena_maps(cells), self.latencies()))
            case Show(service):
                detail = self._engine.detail(service)
                unknown = Failed(f"there is no service {service[:128]!r}")
                await _say(writer, unknown if detail is None else Detail(detail))
            case Requests():
                await _say(writer, RequestList(self._engine.requests()))
            case Batches(cancel):
                await _say(writer, await self._tell_batches(cancel))
            case Plan():
                await _say(writer, PlanReport(self._engine.plan()))
            case Cancel(number):
                await _say(writer, self._cancel(number))
            case Load(service, devices):
                await self._follow(self._engine.load(service, devices), service, writer)
            case Evict(service, now):
                await self._follow(self._engine.evict(service, now), service, writer)
            case Pin(service, on):
                command = self._engine.operate(lambda ticket: PinWanted(ticket, service, on))
                await self._follow(command, service, writer)
            case Drain():
                await self._follow(self._engine.operate(_drain_event(request)), request.service, writer)
            case Events():
                await self._tell_events(request, reader, writer)
            case Reload():
                await _say(writer, self._reload())

    async def _tell_batches(self, cancel: str) -> BatchList | Ok | Failed:
        if self.batches is None:
            return Failed("this daemon has no batches")
        try:
            if not cancel:
                return BatchList(await self.batches.list())
            await self.batches.cancel(cancel)
        except ControlError as error:
            return Failed(str(error)[:MAX_MESSAGE_CHARACTERS])
        return Ok()

    def _cancel(self, number: int) -> Ok | Failed:
        if all(request.request != number for request in self._engine.requests()):
            return Failed(f"there is no request {number}, or it is over")
        self._engine.cancel(number)
        return Ok()

    def _reload(self) -> Reloaded | Failed:
        if self.reload is None:
            return Failed("this daemon cannot read its configuration again")
        try:
            return Reloaded(*self.reload())
        except ConfigError as error:
            return Failed(f"the configuration stays as it was: {error}")

    async def _tell_events(
        self, wanted: Events, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """If it follows, until the client hangs up or says anything."""
        feed = self._engine.feed
        if not wanted.follow:
            for happening in feed.recent(wanted.last):
                await _say(writer, Event(happening))
            await _say(writer, Ok())
            return

        async def tell() -> None:
            async for happening in feed.follow(wanted.last):
                await _say(writer, Event(happening))

        tasks = (asyncio.create_task(tell()), asyncio.create_task(reader.read(1)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(
        self, command: Coroutine[Any, Any, None], service: str, writer: asyncio.StreamWriter
    ) -> None:
        """Wait for a command, telling how far it is. When the client hangs up, the command goes on."""
        task = asyncio.create_task(_outcome(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        told: Progress | None = None
        while not task.done():
            progress = self._progress(service)
            if progress is not None and progress != told:
                await _say(writer, progress)
                told = progress
            await asyncio.wait((task,), timeout=PROGRESS_SECONDS)
        await _say(writer, task.result())

    def _progress(self, service: str) -> Progress | None:
        for entry in self._engine.status().services:
            if entry.name == service:
                return Progress(service, entry.state, entry.stage, entry.device)
        return None


def _drain_event(wanted: Drain) -> Callable[[int], OperatorEvent]:
    if wanted.device is not None:
        index = wanted.device
        return lambda ticket: DeviceDrainWanted(ticket, index, wanted.on)
    if wanted.service:
        return lambda ticket: ServiceDrainWanted(ticket, wanted.service, wanted.on)
    return lambda ticket: NodeDrainWanted(ticket, wanted.on)


async def _outcome(command: Coroutine[Any, Any, None]) -> Ok | Failed:
    """What a command came to. What is not expected is logged here: its client may be gone."""
    try:
        await command
    except ControlError as error:
        return Failed(str(error)[:MAX_MESSAGE_CHARACTERS])
    except Exception:  # noqa: BLE001 - the edge of the process: the operator gets an answer, the log why
        _log.exception("a command failed")
        return Failed("the daemon failed on this command; its log says why")
    return Ok()


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ControlError(f"there is no group {name!r}") from None


def may_speak(uid: int, gid: int, group: int | None) -> bool:
    """Whether a peer with these credentials may command. group: gid whose members may, None = nobody's."""
    if uid in (0, os.getuid()):
        return True
    if group is None:
        return False
    with contextlib.suppress(KeyError):
        return group in os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    return gid == group


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what the client still sends: closing with it unread resets the connection and loses our answer."""
    if not writer.is_closing():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while await reader.read(MAX_LINE_BYTES):
                pass


async def _say(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if writer.is_closing():  # uvloop's transports raise RuntimeError when they are written to then
        raise ConnectionResetError("the client hung up")
    writer.write(msgspec.json.encode(reply) + b"\n")
    await writer.drain()

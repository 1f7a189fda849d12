"""The journal: every (now, event) of a run, so that an incident can be run again.

Owns the file format, its bound, and the flight recorder. Must not know what events mean. A file is frames
(length, msgpack): first the node's settings, or a checkpoint of the node, then records. Each record carries a
checksum of the actions that the event led to.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from seallmd.core.events import Action, Event
from seallmd.core.node import Node
from seallmd.core.settings import NodeSettings
from seallmd.core.snapshot import freeze, thaw
from seallmd.files import write_whole

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
DUMPS_KEPT = 5


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One event. now: seconds on the daemon's clock. actions: checksum of what it led to."""

    now: float
    event: Event
    actions: int


def checksum(actions: list[Action]) -> int:
    """A checksum that differs when any action differs."""
    return zlib.crc32(msgspec.msgpack.encode(actions))


class Checkpoint(msgspec.Struct, frozen=True, tag="checkpoint"):
    """The node at a moment, instead of settings. node: as `core.snapshot` has it."""

    now: float
    node: bytes


class _Kind(msgspec.Struct):
    type: str | None = None


class Journal:
    """Writes a journal up to `limit_bytes`, then stops: only an unbroken beginning can be replayed.

    A disk that is full ends the recording too, and nothing else. Raises OSError where it cannot be begun.
    """

    def __init__(self, path: Path, limit_bytes: int, settings: NodeSettings) -> None:
        self._file = path.open("wb")
        self._left = limit_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._write(self._encoder.encode(settings))

    def record(self, now: float, event: Event, actions: list[Action]) -> None:
        """Add one event."""
        if self._left > 0:
            self._write(self._encoder.encode(Record(now, event, checksum(actions))))

    def _write(self, body: bytes) -> None:
        try:
            self._file.write(_LENGTH.pack(len(body)) + body)
            self._left -= _LENGTH.size + len(body)
            if self._left <= 0:
                log.warning("the journal has reached its limit: recording stops")
                self._file.flush()
        except OSError as error:
            self._left = 0
            log.error("the journal cannot be written: %s: recording stops", error.strerror)

    def close(self) -> None:
        """Write out what is buffered."""
        try:
            self._file.close()
        except OSError as error:
            log.error("the journal's end cannot be written: %s", error.strerror)


class FlightRecorder:
    """The last minutes, in memory, for when things go wrong: a checkpoint of the node, and what came after.

    Two stretches are kept, each of at most half the limit; the older one goes when the newer one is full. So
    a dump has between half and all of the limit, if that much has happened. A checkpoint takes time in
    proportion to what the node holds, so it waits for a moment without requests, but not for long.
    """

    def __init__(self, node: Node, limit_bytes: int) -> None:
        self._node = node
        self._half = limit_bytes // 2
        self._encoder = msgspec.msgpack.Encoder()
        self._older: list[bytes] = []
        self._newer = [self._checkpoint(0.0)]
        self._filled = 0

    def record(self, now: float, event: Event, actions: list[Action]) -> None:
        """Add one event, which the node has just handled."""
        body = self._encoder.encode(Record(now, event, checksum(actions)))
        self._newer.append(body)
        self._filled += len(body)
        if self._filled >= self._half and (not self._node.state.requests or self._filled >= 2 * self._half):
            self._older, self._newer = self._newer, [self._checkpoint(now)]
            self._filled = 0

    def failed(self, now: float, event: Event) -> None:
        """Add the event that the node could not handle: a replay ends where the node did."""
        self._newer.append(self._encoder.encode(Record(now, event, 0)))

    def _checkpoint(self, now: float) -> bytes:
        return self._encoder.encode(Checkpoint(now, freeze(self._node)))

    def dump(self, directory: Path) -> Path:
        """Write a file that `read` understands, which nobody else may read: it holds prompts. Raises OSError.

        The oldest of earlier dumps make room for it.
        """
        path = directory / f"flight-{time.time_ns()}.journal"
        for old in sorted(directory.glob("flight-*.journal"))[: -(DUMPS_KEPT - 1)]:
            old.unlink(missing_ok=True)
        # The newer stretch alone would lack the way to the failure, if it has just begun.
        bodies = [*self._older, *(self._newer[1:] if self._older else self._newer)]
        write_whole(path, (_LENGTH.pack(len(body)) + body for body in bodies), mode=0o600)
        return path


def read(path: Path) -> tuple[Node, Iterator[Record]]:
    """The node as a recording begins, and what happened; a last record that a crash cut off is left out.

    Raises ValueError when the file is not a journal.
    """
    frames = _frames(path)
    try:
        node = _first(next(frames))
    except (StopIteration, msgspec.DecodeError) as error:
        raise ValueError(f"{path} is not a journal") from error
    decoder = msgspec.msgpack.Decoder(Record)
    return node, (decoder.decode(body) for body in frames)


def _first(body: bytes) -> Node:
    if msgspec.msgpack.decode(body, type=_Kind).type is None:
        return Node(msgspec.msgpack.decode(body, type=NodeSettings))
    node = thaw(msgspec.msgpack.decode(body, type=Checkpoint).node)
    if not isinstance(node, Node):
        raise ValueError("a checkpoint of something else")
    return node


def _frames(path: Path) -> Iterator[bytes]:
    left = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (size,) = _LENGTH.unpack(head)
            left -= _LENGTH.size + size
            if left < 0:  # before memory is taken on the file's word
                return
            yield file.read(size)

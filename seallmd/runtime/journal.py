"""The journal: every (now, event) of a run, so that an incident can be run again.

Owns the file format and its bound. Must not know what events mean. A file is frames (length, msgpack): first
the node's settings, then records. Each record carries a checksum of the actions that the event led to.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from seallmd.core.events import Action, Event
from seallmd.core.settings import NodeSettings

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One event. now: seconds on the daemon's clock. actions: checksum of what it led to."""

    now: float
    event: Event
    actions: int


def checksum(actions: list[Action]) -> int:
    """A checksum that differs when any action differs."""
    return zlib.crc32(msgspec.msgpack.encode(actions))


class Journal:
    """Writes a journal up to `limit_bytes`, then stops: only an unbroken beginning can be replayed."""

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
        self._file.write(_LENGTH.pack(len(body)) + body)
        self._left -= _LENGTH.size + len(body)
        if self._left <= 0:
            log.warning("the journal has reached its limit: recording stops")
            self._file.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


def read(path: Path) -> tuple[NodeSettings, Iterator[Record]]:
    """A journal's settings and records; a last record that was cut off by a crash is left out.

    Raises ValueError when the file is not a journal.
    """
    frames = _frames(path)
    try:
        settings = msgspec.msgpack.decode(next(frames), type=NodeSettings)
    except (StopIteration, msgspec.DecodeError) as error:
        raise ValueError(f"{path} is not a journal") from error
    decoder = msgspec.msgpack.Decoder(Record)
    return settings, (decoder.decode(body) for body in frames)


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (size,) = _LENGTH.unpack(head)
            body = file.read(size)
            if len(body) < size:
                return
            yield body

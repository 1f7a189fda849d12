"""How messages travel: a frame is a 4-byte little-endian length and that many bytes of msgpack.

Owns bytes to messages and back. Must not know what messages mean, nor sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from seallmd.core.messages import Message

MAX_FRAME_BYTES = 1 << 28
_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()


def frame(message: Message) -> bytes:
    """The bytes of one message on the wire."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Bytes in, messages out. `kind` is one of the unions above, or a list of message types as a union."""

    def __init__(self, kind: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """Yield every message completed by `data`. Raises DecodeError or ValueError on a bad frame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield self._decoder.decode(body)

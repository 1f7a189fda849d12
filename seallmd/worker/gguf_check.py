"""Whether a GGUF file is what it says, before a reader with less suspicion gets it.

Owns a walk over the header that reads nothing but what is there and allocates nothing on the file's word:
lengths are compared with what is left of the file first. Must not know what the fields mean. Known readers
were brought down by such files (SECURITY.md). The format: github.com/ggml-org/ggml, docs/gguf.md; versions 2
and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from seallmd.errors import ModelRefused

MAX_ENTRIES = 1 << 16  # key-value pairs, and tensors
MAX_NAME_BYTES = 1 << 16
MAX_DEPTH = 4  # of arrays of arrays
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by type of a value
_STRING, _ARRAY = 8, 9


def check_gguf(file: Path) -> None:
    """Raise ModelRefused with the reason unless header and tensors lie within the file."""
    try:
        with file.open("rb") as source:
            _Walk(source, file.stat().st_size).run()
    except (struct.error, EOFError) as error:
        raise ModelRefused(f"{file.name} is damaged or cut short") from error


class _Walk:
    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source = source
        self._size = size
        self._alignment = 32

    def run(self) -> None:
        magic = self._source.read(4)
        version, tensors, pairs = self._unpack("<IQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ModelRefused("the file is no GGUF of version 2 or 3")
        if max(tensors, pairs) > MAX_ENTRIES or tensors < 1:
            raise ModelRefused(f"the GGUF file says that it has {tensors} tensors and {pairs} fields")
        for _ in range(pairs):
            self._pair()
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._source.tell() // self._alignment) * self._alignment
        if start + max(ends) > self._size:
            raise ModelRefused("tensors of the GGUF file end behind its end: it is damaged or cut short")

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._source.read(struct.calcsize(form)))

    def _skip(self, bytes_: int) -> None:
        if bytes_ > self._size - self._source.tell():
            raise EOFError
        self._source.seek(bytes_, 1)

    def _name(self) -> bytes:
        (length,) = self._unpack("<Q")
        if length > MAX_NAME_BYTES:
            raise ModelRefused(f"the GGUF file has a name of {length} bytes")
        return self._source.read(length)

    def _pair(self) -> None:
        name, (kind,) = self._name(), self._unpack("<I")
        if name == b"general.alignment" and kind == 4:
            (self._alignment,) = self._unpack("<I")
            if not 1 <= self._alignment <= 1 << 20:
                raise ModelRefused(f"the GGUF file aligns its tensors to {self._alignment} bytes")
        else:
            self._value(kind, 0)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._skip(self._unpack("<Q")[0])
        elif kind == _ARRAY and depth < MAX_DEPTH:
            inner, count = self._unpack("<IQ")
            if inner in _SCALARS:
                self._skip(_SCALARS[inner] * count)
            elif count * 8 > self._size:  # each has a length at least
                raise EOFError
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        else:
            raise ModelRefused(f"the GGUF file has a field of an unknown type ({kind})")

    def _tensor(self) -> int:
        """Where its data end, from the start of all data."""
        self._name()
        (rank,) = self._unpack("<I")
        if not 1 <= rank <= 4:
            raise ModelRefused(f"the GGUF file has a tensor of {rank} dimensions")
        shape = self._unpack(f"<{rank}Q")
        kind, offset = self._unpack("<IQ")
        try:
            block, bytes_ = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ModelRefused(f"the GGUF file has a tensor of an unknown type ({kind})") from error
        count = 1
        for length in shape:
            count *= length  # Python's numbers do not overflow
        if count < 1 or shape[0] % block:
            raise ModelRefused("the GGUF file has a tensor whose shape is impossible")
        return offset + count // block * bytes_

"""Host images on disk, so that a restart maps them instead of building them.

Owns a directory of files, each an image and behind it a seal: what it was made from and its checksum. One is
made under another name and renamed when it is whole and on the disk; one whose seal or bytes do not fit is
deleted, and counts as not there. Must not know models or messages.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from seallmd.files import partial_of

_MAGIC = b"seallmd image 1\n"
_LENGTH_BYTES = 4
_MAX_SEAL_BYTES = 4096
_PIECE_BYTES = 16 << 20

Progress = Callable[[int, int], None]


class _Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Behind the image, and behind it its own length and the magic. crc: CRC-32 of the image."""

    key: str
    bytes_: int
    crc: int


class ImageCache:
    """The images in `directory`, `limit` bytes of them at most; the longest unused go first.

    Several processes may share it. say: told in one line when something is wrong, from any thread.
    """

    def __init__(self, directory: Path, limit: int, say: Callable[[str], None]) -> None:
        self._directory, self._limit, self._say = directory, limit, say
        self._writing = threading.Lock()  # flock is no lock between threads of one process

    def find(self, parts: object, bytes_: int, progress: Progress) -> int | None:
        """A descriptor of the image made from `parts`, for reading; None if there is none that is whole.

        parts: plain values that name everything on which the image depends. All of it is read, and so is in
        memory where there is room. progress: called with (bytes done, bytes in all).
        """
        key = _key(parts)
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            defect = _defect(descriptor, key, bytes_, progress)
        except OSError as error:  # the disk cannot read it
            defect = str(error)
        if not defect:
            with contextlib.suppress(OSError):  # a disk that may only be read, or root's file
                os.utime(descriptor)  # used just now
            return descriptor
        os.close(descriptor)
        self._say(f"a cached image is built anew: {defect}")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def keep(self, parts: object, descriptor: int, bytes_: int) -> threading.Thread | None:
        """Write the image behind `descriptor`, which may be closed meanwhile, in a thread of its own.

        None where it is too large for the cache.
        """
        if bytes_ > self._limit:
            return None
        own = os.dup(descriptor)
        thread = threading.Thread(
            target=self._keep, args=(_key(parts), own, bytes_), name="keep", daemon=True
        )
        thread.start()
        return thread

    def _keep(self, key: str, descriptor: int, bytes_: int) -> None:
        try:
            with self._alone():
                if not self._path(key).exists():
                    self._make_room(bytes_)
                    _write(self._path(key), key, descriptor, bytes_)
        except OSError as error:
            self._say(f"an image cannot be cached: {error.strerror or error}")
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this process alone changes the directory; the kernel lets go if it is killed."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._writing, open(self._directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for torn in self._directory.glob("*.partial"):  # whoever wrote it was killed
                torn.unlink(missing_ok=True)
            yield

    def _make_room(self, bytes_: int) -> None:
        files = sorted(((file.stat(), file) for file in self._directory.glob("*.image")), key=_last_use)
        total = sum(status.st_size for status, _ in files) + bytes_
        for status, file in files:
            if total <= self._limit:
                return
            file.unlink(missing_ok=True)  # who maps it keeps it
            total -= status.st_size

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.image"


def _last_use(entry: tuple[os.stat_result, Path]) -> int:
    return entry[0].st_mtime_ns


def _key(parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:40]


def _write(path: Path, key: str, descriptor: int, bytes_: int) -> None:
    partial = partial_of(path)
    target = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        crc = 0
        with mmap.mmap(descriptor, bytes_, prot=mmap.PROT_READ) as image, memoryview(image) as view:
            for at in range(0, bytes_, _PIECE_BYTES):
                with view[at : at + _PIECE_BYTES] as piece:
                    crc = zlib.crc32(piece, crc)
                    _write_all(target, piece)
        seal = msgspec.json.encode(_Seal(key, bytes_, crc))
        _write_all(target, memoryview(seal + len(seal).to_bytes(_LENGTH_BYTES, "little") + _MAGIC))
        os.fsync(target)
        os.rename(partial, path)
    finally:
        os.close(target)
        partial.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_all(target: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(target, piece) :]


def _defect(descriptor: int, key: str, bytes_: int, progress: Progress) -> str:
    """What is wrong with a file; empty if it is what it should be."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        return "others may write to it"
    seal = _read_seal(descriptor, status.st_size)
    if seal is None:
        return "it is cut short"
    if (seal.key, seal.bytes_) != (key, bytes_):
        return "it is another model's"
    crc, at, buffer = 0, 0, memoryview(bytearray(min(_PIECE_BYTES, bytes_)))
    while at < bytes_:  # read, not mapped: what the disk cannot read is an error then, and not a SIGBUS
        got = os.preadv(descriptor, [buffer[: bytes_ - at]], at)
        crc, at = zlib.crc32(buffer[:got], crc), at + got
        progress(at, bytes_)
        if not got:
            return "it is cut short"
    return "" if crc == seal.crc else "its checksum is wrong"


def _read_seal(descriptor: int, size: int) -> _Seal | None:
    tail = len(_MAGIC) + _LENGTH_BYTES
    end = os.pread(descriptor, tail, max(0, size - tail))
    length = int.from_bytes(end[:_LENGTH_BYTES], "little")
    if end[_LENGTH_BYTES:] != _MAGIC or not 0 < length <= _MAX_SEAL_BYTES:
        return None
    try:
        seal = msgspec.json.decode(os.pread(descriptor, length, max(0, size - tail - length)), type=_Seal)
    except msgspec.MsgspecError:
        return None
    return seal if seal.bytes_ == size - tail - length else None

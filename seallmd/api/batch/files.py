"""The files of clients: uploaded, listed, read, deleted.

Owns the table of files and the bytes behind it. A file is first written under a name that nobody asks for,
and renamed when it is whole and on disk; a row comes after that. So whatever kills the process, no half file
is ever seen, and what no row names is removed at the next start. Must not know batches but for which files
they need, nor HTTP. Blocks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from seallmd.api.batch.database import OVER_WORDS, Database, disk_errors, disk_full
from seallmd.api.batch.records import FileRecord
from seallmd.api.settings import BatchSettings
from seallmd.errors import RequestError

_PARTIAL = "partial-"
_FIELDS = "id, owner, bytes, created_at, filename, purpose, expires_at"


class Partial:
    """A file that is being written; `drop` it, unless it was kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=1 << 20)

    def write(self, data: bytes) -> None:
        """More of it. Raises RequestError (507)."""
        with disk_errors():
            self._put(data)
        self.bytes += len(data)

    def _put(self, data: bytes) -> None:
        self._file.write(data)

    def finish(self) -> None:
        """It is whole: on disk when this returns."""
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def drop(self) -> None:
        """It is of no use, or has another name by now."""
        with contextlib.suppress(OSError):  # a full disk: what was buffered is of no use either
            self._file.close()
        self.path.unlink(missing_ok=True)


class Files:
    """The files of everybody."""

    def __init__(self, database: Database, settings: BatchSettings) -> None:
        self._database = database
        self._settings = settings
        self._remove_strays()

    def path(self, file: str) -> Path:
        """Where its bytes are. file: an id that was found here, never a client's word."""
        return self._database.files / file

    def partial(self) -> Partial:
        """Begin a file. Raises RequestError (507)."""
        with disk_errors():
            return Partial(self._database.files / (_PARTIAL + secrets.token_hex(8)))

    def room(self) -> int:
        """Bytes that may still be stored, of files and of the results of batches that go on."""
        (files,) = self._database.read("SELECT coalesce(sum(bytes), 0) FROM files")[0]
        (answers,) = self._database.read("SELECT coalesce(sum(answer_bytes), 0) FROM batches")[0]
        return max(0, self._settings.max_total_bytes - int(files) - int(answers))

    def count(self, owner: str) -> int:
        """How many files a key has."""
        return int(self._database.read("SELECT count(*) FROM files WHERE owner = ?", owner)[0][0])

    def keep(
        self, owner: str, partial: Partial, filename: str, purpose: str, seconds: float | None
    ) -> FileRecord:
        """Give a finished file its name. seconds: how long it is kept, None = until it is deleted.

        Raises RequestError: 507 when there is no room for it, 400 when the key has too many.
        """
        if self.count(owner) >= self._settings.max_files:
            raise RequestError(
                f"this key has {self._settings.max_files} files: delete some", code="too_many_files"
            )
        if partial.bytes > self.room():
            raise no_room(self._settings)
        record = self.named(owner, partial, filename, purpose, seconds)
        try:
            with self._database.transaction() as connection:
                self.insert(connection, record)
        except BaseException:
            self.path(record.id).unlink(missing_ok=True)
            raise
        return record

    def named(
        self, owner: str, partial: Partial, filename: str, purpose: str, seconds: float | None
    ) -> FileRecord:
        """The same without its row: that is `insert`ed with what belongs to it."""
        now = int(time.time())
        record = FileRecord(
            *(f"file-{secrets.token_hex(12)}", owner, partial.bytes, now, filename, purpose),
            None if seconds is None else now + int(seconds),
        )
        with disk_errors():
            partial.path.rename(self.path(record.id))
            _sync_directory(self._database.files)
        return record

    def insert(self, connection: sqlite3.Connection, record: FileRecord) -> None:
        """The row of a file, as part of a transaction."""
        values = [getattr(record, field) for field in record.__struct_fields__]
        connection.execute(f"INSERT INTO files ({_FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def find(self, owner: str, file: str) -> FileRecord:
        """One of a key's files. Raises RequestError (404)."""
        rows = self._database.read(f"SELECT {_FIELDS} FROM files WHERE id = ? AND owner = ?", file, owner)
        if not rows or _is_past(rows[0]["expires_at"]):
            raise RequestError(
                f"there is no file {file[:64]!r}", status=404, code="file_not_found", param="file_id"
            )
        return FileRecord(*rows[0])

    def some(
        self, owner: str, purpose: str, after: str, limit: int, *, oldest_first: bool
    ) -> list[FileRecord]:
        """A page of a key's files. after: an id; empty = from the beginning. Raises RequestError (404)."""
        compare, order = (">", "ASC") if oldest_first else ("<", "DESC")
        place: list[object] = []
        where = "owner = ? AND (expires_at IS NULL OR expires_at > ?)"
        if purpose:
            where += " AND purpose = ?"
            place.append(purpose)
        if after:
            where += f" AND rowid {compare} (SELECT rowid FROM files WHERE id = ?)"
            place.append(self.find(owner, after).id)
        query = f"SELECT {_FIELDS} FROM files WHERE {where} ORDER BY rowid {order} LIMIT ?"
        return [FileRecord(*row) for row in self._database.read(query, owner, time.time(), *place, limit)]

    def delete(self, owner: str, file: str) -> None:
        """Remove a file. Raises RequestError: 404, or 409 while a batch needs it."""
        self.find(owner, file)
        query = f"SELECT id FROM batches WHERE input_file_id = ? AND status NOT IN ({OVER_WORDS})"
        if users := self._database.read(query, file):
            raise RequestError(
                f"{users[0]['id']} is not over and needs this file", status=409, code="file_in_use"
            )
        self._remove([file])

    def remove_expired(self) -> None:
        """Remove what has been kept for long enough and no batch needs."""
        query = f"""SELECT id FROM files WHERE expires_at <= ? AND id NOT IN
            (SELECT input_file_id FROM batches WHERE status NOT IN ({OVER_WORDS}))"""
        self._remove([row["id"] for row in self._database.read(query, time.time())])

    def _remove(self, files: Iterable[str]) -> None:
        for file in files:
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM files WHERE id = ?", (file,))
            self.path(file).unlink(missing_ok=True)

    def _remove_strays(self) -> None:
        """What was being written when the process ended, and rows whose bytes somebody has taken away."""
        known = {row["id"] for row in self._database.read("SELECT id FROM files")}
        there = {path.name for path in self._database.files.iterdir()}
        for name in there - known:
            (self._database.files / name).unlink()
        for name in known - there:
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM files WHERE id = ?", (name,))


def no_room(settings: BatchSettings) -> RequestError:
    """There may be room on the disk, but not for these files."""
    return disk_full(f"files and results may take {settings.max_total_bytes} bytes together; delete some")


def _is_past(expires_at: int | None) -> bool:
    return expires_at is not None and expires_at <= time.time()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

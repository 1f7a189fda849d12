"""The state directory of files and batches: one SQLite database, one folder of files, one owner.

Owns opening, the lock against a second daemon, the schema, transactions, and what a full disk is called. Must
not know what the tables mean. Everything here blocks: `batch.store` keeps it off the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from seallmd.api.batch.life import OVER
from seallmd.errors import RequestError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, expires_at INTEGER
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL, created_at INTEGER NOT NULL, deadline REAL NOT NULL,
    status TEXT NOT NULL, times TEXT NOT NULL, metadata TEXT, errors TEXT NOT NULL,
    output_file_id TEXT, error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    answer_bytes INTEGER NOT NULL DEFAULT 0
);
-- Lines of batches that are not over. answer: the line of an output file, once there is one.
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, model TEXT NOT NULL,
    start INTEGER NOT NULL, length INTEGER NOT NULL, good INTEGER, answer BLOB,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner);
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner);
"""
_VERSION = 1
# The states of batches that are over, for queries.
OVER_WORDS = ", ".join(f"'{status.value}'" for status in sorted(OVER))


class StateUnusable(Exception):
    """The directory cannot be used; the message says why, in one line."""


class Database:
    """The open state directory. Not for several threads at once."""

    def __init__(self, directory: Path) -> None:
        """Open it, and create what is not there. Raises StateUnusable."""
        self.files = directory / "files"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.files.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateUnusable(f"{directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connection = _connect(directory / "batches.sqlite")
        except BlockingIOError:
            os.close(self._lock)
            raise StateUnusable(f"{directory} is in use by another daemon") from None
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock)
            raise StateUnusable(f"{directory}: {error}") from error

    def close(self) -> None:
        """Let another daemon have it."""
        self._connection.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, on disk when it ends. Raises RequestError (507) when the disk is full."""
        with disk_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.rollback()
                raise
            self._connection.commit()

    def read(self, query: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query."""
        return self._connection.execute(query, values).fetchall()

    def cursor(self, query: str, *values: object) -> sqlite3.Cursor:
        """The same, row by row; to be closed."""
        return self._connection.execute(query, values)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk in the caller's terms: RequestError (507)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full("the disk is full") from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            raise
        raise disk_full("the disk is full") from error


def disk_full(reason: str) -> RequestError:
    """What is told of a file that cannot be kept."""
    return RequestError(f"nothing more can be stored: {reason}", status=507, code="storage_full")


def _connect(path: Path) -> sqlite3.Connection:
    # Opened in one thread, used in another; never in two at once.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    path.chmod(0o600)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what a client was told is there survives a power cut
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise OSError(f"{path.name} is of another version of seallmd")
    connection.executescript(_SCHEMA)
    connection.execute(f"PRAGMA user_version = {_VERSION}")
    return connection

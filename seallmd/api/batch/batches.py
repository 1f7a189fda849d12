"""The batches of clients, and the lines of those that are not over.

Owns their tables, every change of a batch's status, and the rule that a line is answered once. Each change is
one transaction, so that whatever kills the process, the next one finds a batch in a state of `life`, with the
lines that were answered and those that were not. Must not know how lines are run, nor HTTP. Blocks.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import msgspec

from seallmd.api.batch.database import OVER_WORDS, Database
from seallmd.api.batch.files import Files, no_room
from seallmd.api.batch.life import Status, after
from seallmd.api.batch.records import BatchRecord, FileRecord, LineError
from seallmd.api.settings import BatchSettings
from seallmd.errors import RequestError

# What is told of lines that were never run, by how the batch ended.
_UNRUN = {
    Status.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    Status.CANCELLED: ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    Status.FAILED: ("batch_failed", "This request was not executed because the batch failed."),
}


class Line(msgspec.Struct, frozen=True):
    """A line of an input file: its number from 1, and where in the file it is, in bytes."""

    number: int
    custom_id: str
    model: str
    start: int
    length: int


class Batches:
    """The batches of everybody."""

    def __init__(self, database: Database, files: Files, settings: BatchSettings) -> None:
        self._database = database
        self._files = files
        self._settings = settings

    # ------------------------------------------------------------------------------- looking

    def find(self, owner: str, batch: str) -> BatchRecord:
        """One of a key's batches. Raises RequestError (404)."""
        rows = self._database.read("SELECT * FROM batches WHERE id = ? AND owner = ?", batch, owner)
        if not rows:
            message = f"there is no batch {batch[:64]!r}"
            raise RequestError(message, status=404, code="batch_not_found", param="batch_id")
        return _record(rows[0])

    def get(self, batch: str) -> BatchRecord:
        """A batch that is known to be there."""
        return _record(self._database.read("SELECT * FROM batches WHERE id = ?", batch)[0])

    def some(self, owner: str, after_: str, limit: int) -> list[BatchRecord]:
        """A page of a key's batches, the newest first. after_: an id; empty = from the beginning."""
        where, values = "owner = ?", [owner]
        if after_:
            where += " AND rowid < (SELECT rowid FROM batches WHERE id = ?)"
            values.append(self.find(owner, after_).id)
        query = f"SELECT * FROM batches WHERE {where} ORDER BY rowid DESC LIMIT {limit:d}"
        return [_record(row) for row in self._database.read(query, *values)]

    def everybodys(self, limit: int) -> list[BatchRecord]:
        """The newest batches, those first that are not over."""
        query = f"SELECT * FROM batches ORDER BY status IN ({OVER_WORDS}), rowid DESC LIMIT ?"
        return [_record(row) for row in self._database.read(query, limit)]

    def unfinished(self) -> list[BatchRecord]:
        """Those that are not over, the most urgent first."""
        query = f"SELECT * FROM batches WHERE status NOT IN ({OVER_WORDS}) ORDER BY deadline"
        return [_record(row) for row in self._database.read(query)]

    def pending(self, batch: str, after_: int, limit: int) -> list[Line]:
        """Lines behind a number that have no answer yet, in order."""
        query = """SELECT number, custom_id, model, start, length FROM lines
            WHERE batch = ? AND number > ? AND answer IS NULL ORDER BY number LIMIT ?"""
        return [Line(*row) for row in self._database.read(query, batch, after_, limit)]

    def content(self, batch: str, line: Line) -> bytes:
        """A line of the input. Raises OSError when somebody has taken the file away."""
        with self._files.path(self.get(batch).input_file_id).open("rb") as file:
            file.seek(line.start)
            return file.read(line.length)

    # ------------------------------------------------------------------------------- changing

    def create(
        self,
        owner: str,
        endpoint: str,
        input_file: str,
        window: tuple[str, float],
        metadata: dict[str, str] | None,
    ) -> BatchRecord:
        """A new batch over a file of the key. window: as the client said it, and in seconds.

        Raises RequestError: 404 for the file, 400 when the key has too many batches.
        """
        file = self._files.find(owner, input_file)
        if file.purpose != "batch":
            raise RequestError(f"{file.id} was not uploaded for a batch", param="input_file_id")
        query = f"SELECT count(*) FROM batches WHERE owner = ? AND status NOT IN ({OVER_WORDS})"
        if self._database.read(query, owner)[0][0] >= self._settings.max_batches:
            message = f"this key has {self._settings.max_batches} batches that are not over"
            raise RequestError(message, status=429, code="too_many_batches", retry_after=60.0)
        now = time.time()
        record = BatchRecord(
            *(f"batch_{secrets.token_hex(12)}", owner, endpoint, file.id, window[0]),
            *(int(now), now + window[1], Status.VALIDATING, {}, metadata),
        )
        with self._database.transaction() as connection:
            connection.execute(
                """INSERT INTO batches (id, owner, endpoint, input_file_id, completion_window, created_at,
                deadline, status, times, metadata, errors) VALUES (?, ?, ?, ?, ?, ?, ?, ?, '{}', ?, '[]')""",
                (
                    *(record.id, owner, endpoint, file.id, window[0], record.created_at, record.deadline),
                    *(record.status.value, None if metadata is None else json.dumps(metadata)),
                ),
            )
        return record

    def cancel(self, owner: str, batch: str) -> BatchRecord:
        """Begin to cancel one of a key's batches. Raises RequestError: 404, or 409 when it is too late."""
        record = self.find(owner, batch)
        if record.status is Status.CANCELLING:
            return record
        try:
            return self.move(batch, "cancel")
        except ValueError:
            message = f"{batch} is {record.status.value}: it cannot be cancelled any more"
            raise RequestError(message, status=409, code="batch_not_cancellable") from None

    def begin(self, batch: str, lines: Iterable[Line]) -> BatchRecord:
        """The input was examined: these are its lines."""
        with self._database.transaction() as connection:
            rows = ((batch, x.number, x.custom_id, x.model, x.start, x.length) for x in lines)
            statement = (
                "INSERT INTO lines (batch, number, custom_id, model, start, length) VALUES (?, ?, ?, ?, ?, ?)"
            )
            total = connection.executemany(statement, rows).rowcount
            self._move(connection, batch, "begin", total=max(0, total))
        return self.get(batch)

    def answer(self, batch: str, number: int, line: bytes, *, good: bool) -> bool:
        """A line was run; `line` goes to the output file, or to that of errors. False: it had its answer.

        Raises RequestError (507) when there is no room for it.
        """
        if len(line) > self._files.room():
            raise no_room(self._settings)
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE lines SET answer = ?, good = ? WHERE batch = ? AND number = ? AND answer IS NULL",
                (line, good, batch, number),
            ).rowcount
            if changed:
                counted = "completed" if good else "failed"
                changes = f"{counted} = {counted} + 1, answer_bytes = answer_bytes + ?"
                connection.execute(f"UPDATE batches SET {changes} WHERE id = ?", (len(line), batch))
        return bool(changed)

    def move(self, batch: str, event: str) -> BatchRecord:
        """A change of status that ends nothing. Raises ValueError for an illegal one."""
        with self._database.transaction() as connection:
            self._move(connection, batch, event)
        return self.get(batch)

    def end(self, batch: str, event: str, errors: Iterable[LineError] = ()) -> BatchRecord:
        """It is over, by `event`: write its files, forget its lines. Raises ValueError, RequestError (507).

        What was answered until now is in the files, whatever the end; lines that were not run are among the
        errors, so that each line of the input is in one of the two.
        """
        record = self.get(batch)
        status = after(record.status, event)
        written = {}
        try:
            for good, field in ((True, "output_file_id"), (False, "error_file_id")):
                written[field] = self._write(record, self._outcomes(record, status, good=good), field)
            with self._database.transaction() as connection:
                for file in filter(None, written.values()):
                    self._files.insert(connection, file)
                ids = {field: None if file is None else file.id for field, file in written.items()}
                noted = json.dumps([msgspec.structs.asdict(error) for error in errors])
                self._move(connection, batch, event, **ids, errors=noted, answer_bytes=0)
                connection.execute("DELETE FROM lines WHERE batch = ?", (batch,))
        except BaseException:
            for file in filter(None, written.values()):
                self._files.path(file.id).unlink(missing_ok=True)
            raise
        return self.get(batch)

    def forget_old(self) -> None:
        """Remove the records of batches that were over long ago."""
        with self._database.transaction() as connection:
            connection.execute(
                f"DELETE FROM batches WHERE status IN ({OVER_WORDS}) AND deadline < ? AND created_at < ?",
                (time.time(), time.time() - self._settings.keep_seconds),
            )

    def _move(self, connection: sqlite3.Connection, batch: str, event: str, **changes: object) -> None:
        row = connection.execute("SELECT status, times FROM batches WHERE id = ?", (batch,)).fetchone()
        status = after(Status(row["status"]), event)
        times = {**json.loads(row["times"]), status.value: int(time.time())}
        fields = {"status": status.value, "times": json.dumps(times), **changes}
        assigned = ", ".join(f"{field} = ?" for field in fields)
        connection.execute(f"UPDATE batches SET {assigned} WHERE id = ?", (*fields.values(), batch))

    def _outcomes(self, record: BatchRecord, status: Status, *, good: bool) -> Iterator[bytes]:
        """The lines of an output file."""
        query = "SELECT number, custom_id, good, answer FROM lines WHERE batch = ? ORDER BY number"
        with closing(self._database.cursor(query, record.id)) as rows:
            for number, custom_id, was_good, answer in rows:
                if answer is not None and bool(was_good) is good:
                    yield answer
                elif answer is None and not good:
                    code, message = _UNRUN[status]
                    yield output_line(record.id, number, custom_id, error={"code": code, "message": message})

    def _write(self, record: BatchRecord, lines: Iterator[bytes], field: str) -> FileRecord | None:
        """A file of these lines; None when there are none."""
        first = next(lines, None)
        if first is None:
            return None
        partial = self._files.partial()
        try:
            partial.write(first)
            for line in lines:
                partial.write(line)
            partial.finish()
            name = f"{record.id}_{field.removesuffix('_file_id')}.jsonl"
            return self._files.named(record.owner, partial, name, "batch_output", self._settings.keep_seconds)
        finally:
            partial.drop()


def output_line(
    batch: str,
    number: int,
    custom_id: str,
    *,
    response: dict[str, object] | None = None,
    error: dict[str, str] | None = None,
) -> bytes:
    """A line of an output file, as OpenAI has them."""
    request = f"batch_req_{batch.removeprefix('batch_')}_{number}"
    line = {"id": request, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"


def _record(row: sqlite3.Row) -> BatchRecord:
    fields = {field: row[field] for field in BatchRecord.__struct_fields__}
    for field in ("times", "metadata", "errors"):
        fields[field] = None if fields[field] is None else json.loads(fields[field])
    return msgspec.convert(fields, BatchRecord)

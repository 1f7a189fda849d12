"""The store under random histories with kills: states follow the table, no line is lost or answered twice.

A kill is what is left of the directory when the process is gone in the middle of anything: the connection is
dropped without a word and the directory opened anew, files half written included.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seallmd.api.batch.batches import Batches, Line, output_line
from seallmd.api.batch.database import Database
from seallmd.api.batch.files import Files
from seallmd.api.batch.life import BATCH_LIFE, OVER, Status, after
from seallmd.api.batch.records import LineError
from seallmd.api.settings import BatchSettings
from seallmd.errors import RequestError

SETTINGS = BatchSettings(max_files=1000, max_batches=1000)
EVENTS = sorted({event for _, event in BATCH_LIFE})
ENDS = ("complete", "stop", "expire", "fail")


class Histories(RuleBasedStateMachine):
    """The store beside a model of it: by batch its status, and its lines with their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.status: dict[str, Status] = {}
        self.lines: dict[str, dict[int, bool | None]] = {}
        self.killed: list[Database] = []
        self._open()

    def _open(self) -> None:
        self.database = Database(Path(self.directory.name) / "state")
        self.files = Files(self.database, SETTINGS)
        self.batches = Batches(self.database, self.files, SETTINGS)

    def teardown(self) -> None:
        self.database.close()
        for killed in self.killed:
            killed._connection.close()
        self.directory.cleanup()

    @rule()
    def create(self) -> None:
        partial = self.files.partial()
        partial.write(b"{}\n")
        partial.finish()
        file = self.files.keep("me", partial, "in", "batch", None)
        batch = self.batches.create("me", "/v1/x", file.id, ("24h", 86400.0), None)
        self.status[batch.id] = Status.VALIDATING
        self.lines[batch.id] = {}

    @precondition(lambda self: self.status)
    @rule(data=st.data(), count=st.integers(1, 4))
    def begin(self, data: st.DataObject, count: int) -> None:
        batch = data.draw(st.sampled_from(sorted(self.status)))
        lines = [Line(number, f"id{number}", "m", 0, 3) for number in range(1, count + 1)]
        if self.status[batch] is not Status.VALIDATING:
            with pytest.raises(ValueError, match="cannot begin"):
                self.batches.begin(batch, [Line(n + 100, "z", "m", 0, 3) for n in range(count)])
            return
        assert self.batches.begin(batch, lines).total == count
        self.status[batch] = Status.IN_PROGRESS
        self.lines[batch] = dict.fromkeys(range(1, count + 1))

    @precondition(lambda self: self.status)
    @rule(data=st.data(), number=st.integers(1, 5), good=st.booleans())
    def answer(self, data: st.DataObject, number: int, good: bool) -> None:
        batch = data.draw(st.sampled_from(sorted(self.status)))
        known = self.lines[batch]
        fresh = self.status[batch] not in OVER and number in known and known[number] is None
        line = output_line(batch, number, f"id{number}", response={"good": good})
        assert self.batches.answer(batch, number, line, good=good) is fresh
        if fresh:
            known[number] = good

    @precondition(lambda self: self.status)
    @rule(data=st.data(), event=st.sampled_from(EVENTS))
    def change(self, data: st.DataObject, event: str) -> None:
        batch = data.draw(st.sampled_from(sorted(self.status)))
        if event == "begin":
            return
        try:
            expected = after(self.status[batch], event)
        except ValueError:
            with pytest.raises(ValueError, match="cannot"):
                self._apply(batch, event)
            return
        if event == "complete" and None in self.lines[batch].values():
            return  # the runner ends nothing that is not answered
        self._apply(batch, event)
        self.status[batch] = expected
        if expected in OVER:
            self._check_files(batch)

    def _apply(self, batch: str, event: str) -> None:
        if event in ENDS:
            self.batches.end(batch, event, [LineError("x", "y")] if event == "fail" else ())
        else:
            self.batches.move(batch, event)

    def _check_files(self, batch: str) -> None:
        """Each line is in exactly one of the two files, and in the right one."""
        record, told = self.batches.get(batch), dict[int, bool]()
        for file, good in ((record.output_file_id, True), (record.error_file_id, False)):
            text = self.files.path(self.files.find("me", file).id).read_text() if file else ""
            for raw in text.splitlines():
                number = int(json.loads(raw)["custom_id"].removeprefix("id"))
                assert number not in told, "a line was answered twice"
                told[number] = good
        assert told == {number: good is True for number, good in self.lines[batch].items()}

    @rule(half=st.booleans())
    def kill(self, half: bool) -> None:
        """Nothing is said to the database; what was being written stays as it is."""
        if half:
            (self.database.files / f"partial-{len(self.killed)}").write_bytes(b"half")
        self.killed.append(self.database)
        os.close(self.database._lock)
        self._open()

    @rule()
    def kill_in_a_transaction(self) -> None:
        """A change that was not committed never happened."""
        connection = self.database._connection
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM lines")
        connection.execute("UPDATE batches SET status = 'completed'")
        connection.close()
        os.close(self.database._lock)
        self._open()

    @invariant()
    def same_as_the_model(self) -> None:
        for batch, status in self.status.items():
            record = self.batches.get(batch)
            answers = list(self.lines[batch].values())
            assert record.status is status
            assert (record.completed, record.failed) == (answers.count(True), answers.count(False))
            pending = [line.number for line in self.batches.pending(batch, 0, 10)]
            unanswered = [number for number, good in self.lines[batch].items() if good is None]
            assert pending == ([] if status in OVER else unanswered)
        known = {row["id"] for row in self.database.read("SELECT id FROM files")}
        there = {path.name for path in self.files.path("x").parent.iterdir()}
        assert known <= there, "a file without its bytes"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_an_end_without_room_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a full disk at the very end costs no answer; the batch ends when there is room again."""
    database = Database(tmp_path)
    files = Files(database, SETTINGS)
    batches = Batches(database, files, SETTINGS)
    partial = files.partial()
    partial.finish()
    file = files.keep("", partial, "in", "batch", None)
    batch = batches.create("", "/v1/x", file.id, ("1h", 3600.0), None).id
    batches.begin(batch, [Line(1, "a", "m", 0, 1)])
    assert batches.answer(batch, 1, output_line(batch, 1, "a"), good=True)
    batches.move(batch, "answered")
    database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = database._connection.execute("PRAGMA page_count").fetchone()[0]
    database._connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for _ in range(200):
            batches.create("", "/v1/x", file.id, ("1h", 3600.0), {"k": "v" * 500})

    with pytest.raises(RequestError, match="full") as caught:  # SQLite's own word for it
        fill()
    assert caught.value.status == 507
    with monkeypatch.context() as patch:
        patch.setattr(files, "insert", lambda *_: (_ for _ in ()).throw(RequestError("full", status=507)))
        with pytest.raises(RequestError):
            batches.end(batch, "complete")
    assert batches.get(batch).status is Status.FINALIZING
    assert [path.name for path in database.files.iterdir()] == [file.id]
    database._connection.execute("PRAGMA max_page_count = 100000")
    assert batches.end(batch, "complete").output_file_id is not None
    database.close()

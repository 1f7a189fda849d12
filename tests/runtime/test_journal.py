"""The journal of a run replays to the same actions, is bounded, and survives being cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from seallmd.core import events as ev
from seallmd.core.node import Node
from seallmd.runtime.journal import Journal, read
from tests.core.test_histories import ACTIONS, History
from tools import replay


def record_history(path: Path, limit_bytes: int = 1 << 24) -> int:
    """Journal a history with faults; returns how many events it had."""
    history = History(3)
    journal = Journal(path, limit_bytes, history.world.node.state.settings)

    node = Node(history.world.node.state.settings)  # the world kept none: run its events again
    for _ in range(300):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    for now, event in history.world.history:
        journal.record(now, event, node.handle(event, now))
    journal.close()
    return len(history.world.history)


def test_a_journal_replays_to_the_same_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an incident report relies on."""
    count = record_history(tmp_path / "run.journal")
    assert replay.main([str(tmp_path / "run.journal"), "--check"]) == 0
    assert f"{count} events" in capsys.readouterr().out


def test_a_difference_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replay would be worthless if it could not fail."""
    history = History(1)
    path = tmp_path / "run.journal"
    journal = Journal(path, 1 << 20, history.world.node.state.settings)
    journal.record(0.0, ev.HostUp(), [ev.Note("", "something that the node never says")])
    journal.close()
    assert replay.main([str(path)]) == 1
    assert "led to other actions" in capsys.readouterr().out


def test_a_journal_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    """kill -9 leaves half a record behind; the rest still counts."""
    path = tmp_path / "run.journal"
    count = record_history(path)
    path.write_bytes(path.read_bytes()[:-3])
    _, records = read(path)
    assert len(list(records)) == count - 1


def test_a_journal_is_bounded(tmp_path: Path) -> None:
    """It stops at its limit, and what is there replays."""
    path = tmp_path / "run.journal"
    record_history(path, limit_bytes=20_000)
    assert 20_000 <= path.stat().st_size < 30_000
    assert replay.main([str(path)]) == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    """One line and exit code 2, no traceback."""
    (tmp_path / "x").write_bytes(b"\x05\x00\x00\x00hello, this is no journal")
    assert replay.main([str(tmp_path / "x")]) == 2
    assert replay.main([str(tmp_path / "none")]) == 2

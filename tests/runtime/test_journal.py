"""The journal of a run replays to the same actions, is bounded, and survives being cut off."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from seallmd.core import events as ev
from seallmd.core.node import Node
from seallmd.runtime.journal import DUMPS_KEPT, FlightRecorder, Journal, read
from tests.core.test_histories import REPLAYABLE, History
from tools import replay


def record_history(path: Path, limit_bytes: int = 1 << 24) -> int:
    """Journal a history with faults; returns how many events it had."""
    history = History(3)
    journal = Journal(path, limit_bytes, history.world.node.state.settings)

    node = Node(history.world.node.state.settings)  # the world kept none: run its events again
    for _ in range(300):
        history.act(history.random.choice(REPLAYABLE))
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


def test_a_record_that_is_longer_than_the_file_costs_no_memory(tmp_path: Path) -> None:
    """Protects whoever reads a journal that is not ours: where it says 3 GiB, nobody makes room for them."""
    path = tmp_path / "run.journal"
    record_history(path, limit_bytes=20_000)
    with path.open("ab") as file:
        file.write(b"\0\0\0\xc0...")
    tracemalloc.start()
    try:
        _, records = read(path)
        assert list(records)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def fly(directory: Path, limit_bytes: int) -> tuple[Path, int]:
    """Record a history with faults in flight; returns the dump and how many events there were."""
    history = History(3)
    node = Node(history.world.node.state.settings)
    recorder = FlightRecorder(node, limit_bytes)
    for _ in range(400):
        history.act(history.random.choice(REPLAYABLE))
    history.finish()
    for now, event in history.world.history:
        recorder.record(now, event, node.handle(event, now))
    return recorder.dump(directory), len(history.world.history)


@pytest.mark.parametrize("limit_bytes", [1 << 24, 20_000])
def test_the_last_minutes_replay(
    limit_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the start, or from a checkpoint in the middle of everything, where the beginning is gone."""
    path, count = fly(tmp_path / "flight", limit_bytes)
    assert path.stat().st_mode & 0o077 == 0, "it holds prompts"
    assert replay.main([str(path), "--check"]) == 0
    replayed = int(capsys.readouterr().out.split()[0])
    assert replayed == count if limit_bytes > 1 << 20 else 20 < replayed < count


def test_the_event_of_which_the_node_failed_is_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dump made while the node breaks ends in the same failure when it is run again."""
    node = Node(History(1).world.node.state.settings)
    recorder = FlightRecorder(node, 1 << 20)
    recorder.record(0.0, ev.HostUp(), node.handle(ev.HostUp(), 0.0))
    up = ev.WorkerUp(0, "cpu", 1 << 16)
    recorder.record(1.0, up, node.handle(up, 1.0))
    recorder.failed(2.0, up)
    assert replay.main([str(recorder.dump(tmp_path))]) == 1
    assert "came up twice" in capsys.readouterr().out


def test_old_dumps_make_room(tmp_path: Path) -> None:
    """An operator who asks often does not fill the disk."""
    recorder = FlightRecorder(Node(History(1).world.node.state.settings), 1 << 16)
    paths = [recorder.dump(tmp_path) for _ in range(DUMPS_KEPT + 3)]
    assert sorted(tmp_path.iterdir()) == paths[-DUMPS_KEPT:]

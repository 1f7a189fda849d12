"""A disk that is full costs what would have been written there, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import httpx2 as httpx
import pytest

from seallmd.files import partial_of, remove_partials, write_whole
from seallmd.runtime.journal import FlightRecorder
from tests.core.test_histories import History
from tests.e2e.daemon import Daemon
from tests.worker.helpers import save_tiny

FULL = Path("/dev/full")  # whoever writes there is told that no space is left


def test_a_daemon_serves_on_a_full_disk(tmp_path: Path) -> None:
    """Neither its log, nor its children's words, nor its journal can be written: it answers all the same."""
    save_tiny(tmp_path / "a")
    config = '[devices]\nkind = "cpu"\ncpu_workers = 1\nthreads = 1\nmemory = "768 KiB"\nblock = "8 KiB"\n'
    config += f'[[service]]\nname = "a"\nmodel = "{tmp_path / "a"}"\n'
    daemon = Daemon(tmp_path, config, log=FULL, journal=FULL)
    try:
        daemon.wait_healthy()
        body = {"model": "a", "prompt": [5, 6], "max_tokens": 4, "ignore_eos": True}
        for _ in range(20):
            answer = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 4
        # 120 is Python's own word for a stderr that could not be written to its end.
        assert daemon.stop() in (0, 120)
    finally:
        daemon.kill()


def test_a_journal_without_a_place_is_said_so(tmp_path: Path) -> None:
    """In a line, before anything is started."""
    daemon = Daemon(tmp_path, '[[service]]\nname = "a"\nmodel = "m"\n', journal=tmp_path / "none" / "journal")
    try:
        assert daemon.process.wait(60) == 2
        assert "the journal" in daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()
    finally:
        daemon.kill()


def without_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files can be made, and nothing can be written into them."""
    opened = os.open

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        os.close(opened(path, flags, mode))
        return opened(FULL, flags & ~os.O_CREAT & ~os.O_TRUNC, mode)

    monkeypatch.setattr(os, "open", open_)


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be written of the new one does not stay to fill the disk further."""
    file = tmp_path / "state"
    write_whole(file, [b"old", b" contents"], mode=0o600)
    assert file.stat().st_mode & 0o777 == 0o600

    def broken() -> Iterable[bytes]:
        yield b"new"
        raise OSError(errno.EIO, "it is gone")

    with pytest.raises(OSError, match="gone"):
        write_whole(file, broken())
    without_space(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, [b"new"] * 10_000)
    assert file.read_bytes() == b"old contents"
    assert list(tmp_path.iterdir()) == [file]


def test_a_flight_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dumps are made when things go wrong anyway."""
    recorder = FlightRecorder(History(1).world.node, 1 << 16)
    without_space(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        recorder.dump(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    """Files and whole directories, one level down too; not what is being written, nor other machines'."""
    gone = str(1 << 22)  # the highest process id is below
    mine = partial_of(tmp_path / "mine")
    mine.touch()
    dead = mine.with_name(mine.name.replace(str(os.getpid()), gone))
    elsewhere = mine.with_name(f".x.another-machine.{gone}.partial")
    for file in (dead, elsewhere):
        file.touch()
    below = tmp_path / "converted" / dead.name
    below.mkdir(parents=True)
    (below / "weights").touch()
    assert len(remove_partials(tmp_path)) == 2
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, below.parent])
    assert not below.exists()


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that may only be read, or of another user: the process that tidies up begins all the same."""
    mine = partial_of(tmp_path / "mine")
    mine.with_name(mine.name.replace(str(os.getpid()), str(1 << 22))).touch()

    def refuse(_: Path, missing_ok: bool = False) -> None:  # noqa: ARG001
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert remove_partials(tmp_path) == []

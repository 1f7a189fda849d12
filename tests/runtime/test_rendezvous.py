"""The directory for tensor-parallel groups comes and goes with the daemon."""

from __future__ import annotations

from pathlib import Path

from seallmd.runtime import rendezvous


def test_what_dead_daemons_left_is_removed(tmp_path: Path) -> None:
    """A directory of a process that is gone goes; that of a living one, and what is ours, stays apart."""
    own = rendezvous.directory_of(tmp_path)
    dead, living = own.parent / "999999999", own.parent / "1"
    for directory in (dead, living, own):
        directory.mkdir(parents=True)
        (directory / "group").write_text("")
    rendezvous.make(own)
    assert own.is_dir()
    assert list(own.iterdir()) == []
    assert living.is_dir()
    assert not dead.exists()
    rendezvous.remove(own)
    assert not own.exists()

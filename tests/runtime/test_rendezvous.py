"""The directory for tensor-parallel groups comes and goes with the daemon."""

from __future__ import annotations

import os
from pathlib import Path

from seallmd.runtime import rendezvous


def test_what_dead_daemons_left_is_removed(tmp_path: Path) -> None:
    """A directory of a process that is gone goes; that of a living one, and what is ours, stays apart. So
    does that of another container, whose processes this one cannot see."""
    own = rendezvous.directory_of(tmp_path)
    node = os.uname().nodename
    dead, living = own.parent / f"{node}-999999999", own.parent / f"{node}-1"
    elsewhere = own.parent / "another-container-999999999"
    for directory in (dead, living, elsewhere, own):
        directory.mkdir(parents=True)
        (directory / "group").write_text("")
    rendezvous.make(own)
    assert own.is_dir()
    assert list(own.iterdir()) == []
    assert living.is_dir()
    assert elsewhere.is_dir()
    assert not dead.exists()
    rendezvous.remove(own)
    assert not own.exists()

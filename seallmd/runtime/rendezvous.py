"""The directory in which the members of tensor-parallel groups find each other.

Owns its making and removal. Must not know what the workers put there. One per daemon, named after its
process: what a killed daemon left is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def directory_of(cache: Path) -> Path:
    """This process's directory below a cache directory."""
    return cache / "rendezvous" / str(os.getpid())


def make(directory: Path) -> None:
    """Make it, empty; remove those of processes that are gone. Raises OSError."""
    if directory.parent.is_dir():
        for left in directory.parent.iterdir():
            if left == directory or not Path("/proc", left.name).exists():
                shutil.rmtree(left, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)


def remove(directory: Path) -> None:
    """Take it away again."""
    shutil.rmtree(directory, ignore_errors=True)

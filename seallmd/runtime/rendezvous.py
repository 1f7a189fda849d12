"""The directory in which the members of tensor-parallel groups find each other.

Owns its making and removal. Must not know what the workers put there. One per daemon, named after its machine
and process: what a killed daemon left is removed by the next one. Containers that share a cache have other
names, and do not see each other's processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def directory_of(cache: Path) -> Path:
    """This process's directory below a cache directory."""
    return cache / "rendezvous" / f"{os.uname().nodename}-{os.getpid()}"


def make(directory: Path) -> None:
    """Make it, empty; remove those of processes that are gone. Raises OSError."""
    if directory.parent.is_dir():
        for left in directory.parent.iterdir():
            node, _, process = left.name.rpartition("-")
            gone = node == os.uname().nodename and not Path("/proc", process).exists()
            if left == directory or gone:
                shutil.rmtree(left, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)


def remove(directory: Path) -> None:
    """Take it away again."""
    shutil.rmtree(directory, ignore_errors=True)

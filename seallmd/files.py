"""Files and directories that are there whole, or not at all.

Owns how they come into being: under another name beside their place, renamed at the end; and the removal of
what was half-written when its writer was killed. Must not know what is in them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<node>[^.]*)\.(?P<pid>\d+)\.partial")


def partial_of(path: Path) -> Path:
    """Where this process writes what shall be at `path`. One writer per process and path at a time."""
    return path.with_name(f".{path.name}.{_node()}.{os.getpid()}.partial")


def write_whole(path: Path, parts: Iterable[bytes], mode: int = 0o644) -> None:
    """Write a file, or leave what was there as it was. Raises OSError: then nothing half-written stays.

    A machine that loses power may keep neither the old nor the new contents.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = partial_of(path)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(directory: Path) -> list[str]:
    """Remove what processes of this machine that are gone left in a directory and those below it; its names.

    Another machine that shares the directory, or another container, has another node name.
    """
    removed = []
    for entry in (*directory.glob(".*.partial"), *directory.glob("*/.*.partial")):
        found = _PARTIAL.search(entry.name)
        if found and found["node"] == _node() and not Path("/proc", found["pid"]).exists():
            with contextlib.suppress(OSError):  # another user's, or a disk that may only be read
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                removed.append(entry.name)
    return removed


def _node() -> str:
    return os.uname().nodename.replace(".", "-").replace("/", "-")

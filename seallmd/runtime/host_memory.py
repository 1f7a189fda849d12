"""Host memory that workers share: files without a name, which nothing on a disk knows.

Owns their making and their end. Must not know what workers put there. They are the daemon's: what a worker
has left there can be read when it is gone.
"""

from __future__ import annotations

import os


class HostMemory:
    """One file of `bytes_` for each device. paths: where this user's processes find them."""

    def __init__(self, devices: int, bytes_: int) -> None:
        """Takes no memory yet. Raises OSError."""
        count = devices if bytes_ else 0
        self._files = [os.memfd_create(f"seallmd-kv-{index}", os.MFD_CLOEXEC) for index in range(count)]
        for file in self._files:
            os.ftruncate(file, bytes_)
        self.paths = tuple(f"/proc/{os.getpid()}/fd/{file}" for file in self._files)

    def close(self) -> None:
        """The memory is free when the last worker is gone."""
        while self._files:
            os.close(self._files.pop())

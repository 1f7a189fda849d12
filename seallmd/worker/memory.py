"""Memory of the machine: for arenas of CPU devices, and for KV on its way out of devices.

Owns mapping and backing it with pages. Must not know what it holds, nor devices.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress
from typing import Protocol

import torch

from seallmd.core.messages import WorkerSettings
from seallmd.worker.process import require_memory

_POPULATE_BYTES = 4 << 20  # at a time: mappings cannot change meanwhile
_MADV_POPULATE_WRITE = 23


def resident(size: int) -> torch.Tensor:
    """uint8 [size] of zeros, every page of it there soon: what is used sooner costs a page fault."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    tensor = _mapped(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if not _populate_beside(tensor):
        tensor.zero_()  # a kernel before Linux 5.14: touched by writing, and so before anybody else writes
    return tensor


class Locks(Protocol):
    """Makes memory fit for a device to copy from and to."""

    def lock(self, memory: torch.Tensor) -> None:
        """Once, after it is mapped."""

    def unlock(self, memory: torch.Tensor) -> None:
        """Before it is unmapped."""


class HostKv:
    """Host memory for KV of the devices of a machine, uint8 [slots, block_bytes] of each.

    locks: of a device that needs them; None: none does.
    """

    def __init__(self, settings: WorkerSettings, locks: Locks | None = None) -> None:
        self._files, self._index, self._locks = settings.host_kv, settings.index, locks
        self._shape = settings.host_kv_bytes // settings.block_bytes, settings.block_bytes
        self._mapped: dict[int, torch.Tensor] = {}
        self.own = self.of(self._index)

    def of(self, device: int) -> torch.Tensor:
        """A device's; mapped when it is first asked for. Raises MemoryError, OSError, and what `locks` do."""
        if device not in self._mapped:
            slots, block_bytes = self._shape
            memory = self._map(device, slots * block_bytes).view(slots, block_bytes)
            if slots and self._locks is not None:
                self._locks.lock(memory)
            self._mapped[device] = memory
        return self._mapped[device]

    def close(self) -> None:
        """Give it back; no copy may be under way."""
        for memory in self._mapped.values():
            if memory.numel() and self._locks is not None:
                self._locks.unlock(memory)
        self._mapped.clear()
        del self.own

    def _map(self, device: int, size: int) -> torch.Tensor:
        if not self._files:
            assert device == self._index, "nobody has said where other devices' memory is"
            require_memory(size, "host memory for KV")
            return resident(size)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        with open(self._files[device], "r+b") as file:
            there = os.stat(file.fileno()).st_blocks * 512  # of an earlier process, or the device's own
            if device == self._index:
                require_memory(size - there, "host memory for KV")
            tensor = _mapped(mmap.mmap(file.fileno(), size))
        if device == self._index:
            _populate_beside(tensor)
        return tensor


def _mapped(memory: mmap.mmap) -> torch.Tensor:
    # Huge pages: touching 2 GiB took 1.1 s instead of 3.7 s, and linear layers miss the TLB less.
    with suppress(OSError):  # a kernel that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _populate_beside(tensor: torch.Tensor) -> bool:
    """Have every page of it backed, in a thread; False where the kernel cannot."""
    if not _populate(tensor[:_POPULATE_BYTES]):
        return False
    threading.Thread(target=_populate, args=(tensor,), name="populate", daemon=True).start()
    return True


def _populate(memory: torch.Tensor) -> bool:
    """Have the kernel back every page of it, without changing what it holds; False where it cannot."""
    madvise = ctypes.CDLL(None).madvise  # called without Python's lock, unlike mmap's own
    for piece in memory.split(_POPULATE_BYTES):
        address, length = ctypes.c_void_p(piece.data_ptr()), ctypes.c_size_t(piece.numel())
        if madvise(address, length, _MADV_POPULATE_WRITE) != 0:
            return False
    return True

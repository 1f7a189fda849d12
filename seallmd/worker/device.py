"""One device: its arena, and copies of weights into it.

Owns allocation, mapping of host images, streams and synchronisation; the rest of the worker is the same on
CPU and CUDA. Must not know models or messages.

The CUDA half has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

import mmap
import os
import platform
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from seallmd.core.messages import Extent, WorkerSettings
from seallmd.worker.process import require_memory

# One chunk is copied between two steps of the residents: about 5 ms on a CPU, 1 ms over PCIe.
CHUNK_BYTES = 64 << 20


class Copy(ABC):
    """Weights on their way into the arena, chunk by chunk."""

    @abstractmethod
    def advance(self) -> int:
        """Copy a chunk and return its bytes; 0 once everything has arrived."""

    @abstractmethod
    def stop(self) -> None:
        """Give up. Returns when nothing writes to the arena any more."""


class Device(ABC):
    """arena: uint8 [bytes], a multiple of the block size, on `torch_device`. label: a name for people."""

    torch_device: torch.device
    label: str
    arena: torch.Tensor

    @abstractmethod
    def copy_in(self, service: str, path: str, extents: tuple[Extent, ...]) -> Copy:
        """Start to copy a service's image; nothing is written before all that was enqueued is done."""

    def drop_image(self, service: str) -> None:  # noqa: B027 - only devices that keep images have to
        """Forget what is kept of a service's image."""


def open_device(settings: WorkerSettings) -> Device:
    """The device named in the settings, with its arena. Raises MemoryError if it cannot be had."""
    device = torch.device(settings.device)
    return CudaDevice(settings, device) if device.type == "cuda" else CpuDevice(settings)


def _map(path: str, shared: bool) -> torch.Tensor:
    """The image as a tensor. A private mapping cannot be written through by accident."""
    size = os.stat(path).st_size
    return torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)


def _chunks(extents: tuple[Extent, ...]) -> Iterator[tuple[int, int, int]]:
    """(byte in the arena, byte in the image, length)."""
    for extent in extents:
        for at in range(0, extent.bytes_, CHUNK_BYTES):
            yield extent.arena_at + at, extent.image_at + at, min(CHUNK_BYTES, extent.bytes_ - at)


def _check(extents: tuple[Extent, ...], image_bytes: int, arena_bytes: int) -> None:
    for extent in extents:
        if extent.image_at + extent.bytes_ > image_bytes or extent.arena_at + extent.bytes_ > arena_bytes:
            raise RuntimeError("an extent lies outside the image or the arena")


# -------------------------------------------------------------------------------------------------- CPU


class CpuDevice(Device):
    """Main memory as a device."""

    torch_device = torch.device("cpu")

    def __init__(self, settings: WorkerSettings) -> None:
        size = settings.arena_bytes // settings.block_bytes * settings.block_bytes
        if size <= 0:
            raise MemoryError("a CPU device needs arena_bytes of at least one block")
        require_memory(size, "the arena")
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Huge pages: touching 2 GiB took 1.1 s instead of 3.7 s, and linear layers miss the TLB less.
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.arena = torch.frombuffer(memory, dtype=torch.uint8).zero_()  # touched once: no page faults later
        self.label = f"cpu: {_cpu_name()}, {settings.threads} threads"

    def copy_in(self, service: str, path: str, extents: tuple[Extent, ...]) -> Copy:  # noqa: ARG002
        """As `Device.copy_in`. Mapping anew costs nothing, and a dropped image's memory is free at once."""
        image = _map(path, shared=False)
        _check(extents, image.numel(), self.arena.numel())
        return _CpuCopy(self.arena, image, extents)


class _CpuCopy(Copy):
    def __init__(self, arena: torch.Tensor, image: torch.Tensor, extents: tuple[Extent, ...]) -> None:
        self._arena, self._image = arena, image
        self._chunks = _chunks(extents)

    def advance(self) -> int:
        """Copies extents until a chunk's worth of bytes is done."""
        done = 0
        for to, at, size in self._chunks:
            self._arena[to : to + size].copy_(self._image[at : at + size])
            done += size
            if done >= CHUNK_BYTES:
                break
        return done

    def stop(self) -> None:
        """Nothing is under way between two chunks."""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# ------------------------------------------------------------------------------------------------- CUDA


class _Locked(NamedTuple):
    """A mapped image. identity: of the file and the part of it that is page-locked, from `pointer` on."""

    identity: tuple[int, int, int, int]
    image: torch.Tensor
    pointer: int


class CudaDevice(Device):
    """A GPU. Images are page-locked once and stay mapped until another image takes the service's place.

    Of an image for several ranks only this rank's part is locked: locking takes time.
    """

    def __init__(self, settings: WorkerSettings, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.torch_device = device
        self.label = f"{settings.device}: {torch.cuda.get_device_name(device)}"
        size = settings.arena_bytes or torch.cuda.mem_get_info(device)[0] - settings.reserve_bytes
        size = size // settings.block_bytes * settings.block_bytes
        if size <= 0:
            raise MemoryError("the GPU has no memory left for an arena")
        self.arena = torch.zeros(size, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._images: dict[str, _Locked] = {}

    def copy_in(self, service: str, path: str, extents: tuple[Extent, ...]) -> Copy:
        """As `Device.copy_in`."""
        image = self._locked(service, path, extents)
        _check(extents, image.numel(), self.arena.numel())
        # The ledger reuses blocks that steps enqueued before this copy may still read.
        self._stream.wait_event(torch.cuda.current_stream(self.torch_device).record_event())
        return _CudaCopy(self._stream, self.arena, image, extents)

    def drop_image(self, service: str) -> None:
        """Unlock and unmap it."""
        known = self._images.pop(service, None)
        if known is not None:
            self._stream.synchronize()  # a copy may still read it
            torch.cuda.cudart().cudaHostUnregister(known.pointer)

    def _locked(self, service: str, path: str, extents: tuple[Extent, ...]) -> torch.Tensor:
        status = os.stat(path)
        first = min((extent.image_at for extent in extents), default=0) // mmap.PAGESIZE * mmap.PAGESIZE
        last = max((extent.image_at + extent.bytes_ for extent in extents), default=0)
        # Not the path: its descriptor number is used again.
        identity = (status.st_dev, status.st_ino, first, last)
        known = self._images.get(service)
        if known is not None and known.identity == identity:
            return known.image
        self.drop_image(service)
        image = _map(path, shared=True)  # page-locking a private mapping would copy it
        pointer = image.data_ptr() + first
        error = int(torch.cuda.cudart().cudaHostRegister(pointer, last - first, 0))
        if error != 0:
            raise RuntimeError(f"the host image cannot be page-locked (CUDA error {error})")
        self._images[service] = _Locked(identity, image, pointer)
        return image


class _CudaCopy(Copy):
    """Two chunks in flight at most, so that stopping and steps never wait for long."""

    def __init__(
        self,
        stream: torch.cuda.Stream,
        arena: torch.Tensor,
        image: torch.Tensor,
        extents: tuple[Extent, ...],
    ) -> None:
        self._stream, self._arena, self._image = stream, arena, image
        self._chunks = _chunks(extents)
        self._flying: deque[torch.cuda.Event] = deque()

    def advance(self) -> int:
        """Enqueues one chunk; at the end waits for the last."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self.stop()
            return 0
        to, at, size = chunk
        with torch.cuda.stream(self._stream):
            self._arena[to : to + size].copy_(self._image[at : at + size], non_blocking=True)
        self._flying.append(self._stream.record_event())
        if len(self._flying) > 2:
            self._flying.popleft().synchronize()
        return size

    def stop(self) -> None:
        """Waits for the chunks in flight."""
        self._stream.synchronize()

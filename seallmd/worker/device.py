"""One device: its arena, copies of weights into it, and copies of KV to host memory and back.

Owns allocation and mapping of host images, and what is the CPU's; a GPU is in `cuda_device`. The rest of the
worker is the same on both. Must not know models or messages.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from seallmd.core.messages import Extent, WorkerSettings
from seallmd.worker.memory import HostKv, resident
from seallmd.worker.ops import compiled
from seallmd.worker.process import require_memory

# The least that is copied between two steps of the residents: 0.7 ms on a CPU, 0.2 ms over PCIe.
CHUNK_BYTES = 8 << 20

Pair = tuple[torch.Tensor, torch.Tensor]  # source and target of a copy
Done = Callable[[], bool]  # whether a copy is over


class Copy(ABC):
    """Weights on their way into the arena, chunk by chunk.

    image: where they come from, if steps can compute from there as well as from the arena; else None.
    """

    image: torch.Tensor | None = None

    @abstractmethod
    def advance(self) -> int:
        """Copy a chunk and return its bytes; 0 once everything has arrived."""

    @abstractmethod
    def stop(self) -> None:
        """Give up. Returns when nothing writes to the arena any more."""


class Arriving:
    """Numbers on their way from the device to the host. tensor: int64 [n], where they were computed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def arrived(self) -> bool:
        """Whether `take` returns at once."""
        return True

    def take(self) -> list[int]:
        """The numbers; waits for them. Raises AcceleratorError when the device is lost."""
        numbers: list[int] = self.tensor.tolist()
        return numbers


class Device(ABC):
    """arena: uint8 [bytes], a multiple of the block size, on `torch_device`. label: a name for people.

    memory: the arena and one block behind it, number `scratch`, that the ledger does not know: whatever is
    written there is of no use to anybody. host_kv: host memory for KV, this device's and the others'. late:
    calls return before the device has done what they ask for.
    """

    torch_device: torch.device
    label: str
    memory: torch.Tensor
    arena: torch.Tensor
    scratch: int
    host_kv: HostKv
    late = False

    def _take(self, memory: torch.Tensor, block_bytes: int) -> None:
        self.memory, self.arena = memory, memory[:-block_bytes]
        self.scratch = self.arena.numel() // block_bytes

    def fetch(self, tensor: torch.Tensor) -> Arriving:
        """Begin to bring int64 [n] to the host, after all that was enqueued."""
        return Arriving(tensor)

    def __init__(self) -> None:
        self._images: dict[str, tuple[tuple[int, int], torch.Tensor]] = {}

    def copy_in(self, service: str, path: str, extents: tuple[Extent, ...]) -> Copy:
        """Start to copy a service's image; nothing is written before all that was enqueued is done.

        The image stays mapped until it is dropped or another takes its place: on a CPU the page faults of a
        new mapping take as long as the copy, on a GPU page-locking takes longer.
        """
        image = self._image(service, path)
        _check(extents, image.numel(), self.arena.numel())
        return self._start(image, extents)

    def drop_image(self, service: str) -> None:
        """Unmap a service's image; ignored where there is none."""
        known = self._images.pop(service, None)
        if known is not None:
            self._release(known[1])

    def close(self) -> None:
        """Give back what is mapped, in a process that goes on without this device; the last call."""
        for service in list(self._images):
            self.drop_image(service)
        self.host_kv.close()

    def _image(self, service: str, path: str) -> torch.Tensor:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)  # not the path: its descriptor number is used again
        known = self._images.get(service)
        if known is not None and known[0] == identity:
            return known[1]
        self.drop_image(service)
        image = self._map(path, status.st_size)
        self._images[service] = (identity, image)
        return image

    @abstractmethod
    def _map(self, path: str, size: int) -> torch.Tensor:
        """The image at `path`, ready to be copied from."""

    def _release(self, image: torch.Tensor) -> None:  # noqa: B027 - a mapping ends with its tensor
        """Before an image is unmapped."""

    @abstractmethod
    def _start(self, image: torch.Tensor, extents: tuple[Extent, ...]) -> Copy: ...

    def save(self, blocks: Sequence[int], slots: Sequence[int]) -> Done:
        """Copy blocks of the arena to slots of its `host_kv`, after all that was enqueued.

        The copy may still be under way: `restore` and `wait_for` know of it, others ask what this returns.
        Raises RuntimeError for a block or slot that is not there.
        """
        return self._copy_kv(_rows(self._blocks(), blocks, self.host_kv.own, slots), blocks)

    def restore(self, slots: Sequence[int], blocks: Sequence[int], device: int) -> Done:
        """Copy slots of a device's `host_kv` to blocks, after all that was enqueued.

        Raises as `save`, and as `HostKv.of` when another device's memory cannot be mapped.
        """
        return self._copy_kv(_rows(self.host_kv.of(device), slots, self._blocks(), blocks), blocks)

    def wait_for(self, tables: Iterable[Sequence[int]]) -> None:  # noqa: B027 - only where copies are late
        """Have what is enqueued from here on wait for the saving and restoring of these blocks."""

    def release_caches(self) -> None:  # noqa: B027 - only where an allocator keeps what was freed
        """Give back what an allocator holds in reserve, after it could not give more."""

    def _blocks(self) -> torch.Tensor:
        return self.arena.view(-1, self.host_kv.own.shape[1])

    @abstractmethod
    def _copy_kv(self, pairs: Iterable[Pair], blocks: Sequence[int]) -> Done:
        """Copy each pair. blocks: those of the arena that are read or written."""


def open_device(settings: WorkerSettings) -> Device:
    """The device named in the settings, with its arena. Raises MemoryError if it cannot be had."""
    device = torch.device(settings.device)
    if device.type != "cuda":
        return CpuDevice(settings)
    from seallmd.worker.cuda_device import CudaDevice

    return CudaDevice(settings, device)


def chunks(extents: tuple[Extent, ...]) -> Iterator[tuple[int, int, int]]:
    """(byte in the arena, byte in the image, length); none crosses a multiple of CHUNK_BYTES in the image."""
    for extent in extents:
        at, end = extent.image_at, extent.image_at + extent.bytes_
        while at < end:
            size = min(CHUNK_BYTES - at % CHUNK_BYTES, end - at)
            yield extent.arena_at + at - extent.image_at, at, size
            at += size


def _check(extents: tuple[Extent, ...], image_bytes: int, arena_bytes: int) -> None:
    for extent in extents:
        if extent.image_at + extent.bytes_ > image_bytes or extent.arena_at + extent.bytes_ > arena_bytes:
            raise RuntimeError("an extent lies outside the image or the arena")


def _rows(
    source: torch.Tensor, src: Sequence[int], target: torch.Tensor, dst: Sequence[int]
) -> Iterator[Pair]:
    """Rows of two matrices, neighbours together: a copy of a small block takes long to start."""
    for rows, matrix in ((src, source), (dst, target)):
        if rows and not 0 <= min(rows) <= max(rows) < len(matrix):
            raise RuntimeError(f"a block or slot of {min(rows)} to {max(rows)} is none of {len(matrix)}")
    copies = list(zip(src, dst, strict=True))
    begin = 0
    for end, (row, to) in enumerate(copies, start=1):
        if end == len(copies) or copies[end] != (row + 1, to + 1):
            yield source[src[begin] : row + 1], target[dst[begin] : to + 1]
            begin = end


# -------------------------------------------------------------------------------------------------- CPU


class CpuDevice(Device):
    """Main memory as a device."""

    torch_device = torch.device("cpu")

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__()
        size = settings.arena_bytes // settings.block_bytes * settings.block_bytes
        if size <= 0:
            raise MemoryError("a CPU device needs arena_bytes of at least one block")
        require_memory(size, "the arena")
        self._take(resident(size + settings.block_bytes), settings.block_bytes)
        self.host_kv = HostKv(settings)
        self.label = f"cpu: {_cpu_name()}, {settings.threads} threads"

    def _map(self, path: str, size: int) -> torch.Tensor:
        # Private: it cannot be written through by accident.
        return torch.from_file(path, shared=False, size=size, dtype=torch.uint8)

    def _start(self, image: torch.Tensor, extents: tuple[Extent, ...]) -> Copy:
        return _CpuCopy(self.arena, image, extents)

    def _copy_kv(self, pairs: Iterable[Pair], blocks: Sequence[int]) -> Done:  # noqa: ARG002
        """As `Device._copy_kv`; done when it returns."""
        for source, target in pairs:
            _copy(target, source)
        return lambda: True


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Much memory at once, by the compiled operations where there are any."""
    native = compiled()
    if native is None:
        target.copy_(source)
    else:
        native.copy(target, source)


class _CpuCopy(Copy):
    image: torch.Tensor

    def __init__(self, arena: torch.Tensor, image: torch.Tensor, extents: tuple[Extent, ...]) -> None:
        self._arena, self.image = arena, image
        self._chunks = chunks(extents)

    def advance(self) -> int:
        """Copies extents until a chunk's worth of bytes is done."""
        done = 0
        for to, at, size in self._chunks:
            _copy(self._arena[to : to + size], self.image[at : at + size])
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

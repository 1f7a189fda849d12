"""One device: its arena, copies of weights into it, and copies of KV to host memory and back.

Owns allocation, mapping of host images, streams and synchronisation; the rest of the worker is the same on
CPU and CUDA. Must not know models or messages.

The CUDA half has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from seallmd.core.messages import Extent, WorkerSettings
from seallmd.worker.memory import HostKv, resident
from seallmd.worker.ops import compiled
from seallmd.worker.process import require_memory

# The least that is copied between two steps of the residents: 0.7 ms on a CPU, 0.2 ms over PCIe.
CHUNK_BYTES = 8 << 20
_CHUNKS_IN_FLIGHT = 16  # to a GPU: what stopping, and KV behind them on the stream, may have to wait for

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
    return CudaDevice(settings, device) if device.type == "cuda" else CpuDevice(settings)


def _chunks(extents: tuple[Extent, ...]) -> Iterator[tuple[int, int, int]]:
    """(byte in the arena, byte in the image, length)."""
    for extent in extents:
        for at in range(0, extent.bytes_, CHUNK_BYTES):
            yield extent.arena_at + at, extent.image_at + at, min(CHUNK_BYTES, extent.bytes_ - at)


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
        self._chunks = _chunks(extents)

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


# ------------------------------------------------------------------------------------------------- CUDA


class CudaDevice(Device):
    """A GPU. Images are page-locked once."""

    late = True

    def __init__(self, settings: WorkerSettings, device: torch.device) -> None:
        super().__init__()
        torch.cuda.set_device(device)
        self.torch_device = device
        self.label = f"{settings.device}: {torch.cuda.get_device_name(device)}"
        size = settings.arena_bytes or torch.cuda.mem_get_info(device)[0] - settings.reserve_bytes
        size = size // settings.block_bytes * settings.block_bytes
        if size <= 0:
            raise MemoryError("the GPU has no memory left for an arena")
        memory = torch.zeros(size + settings.block_bytes, dtype=torch.uint8, device=device)
        self._take(memory, settings.block_bytes)
        self.host_kv = HostKv(settings, _PageLocks("host memory for KV"))
        self._image_locks = _PageLocks("the host image")
        self._stream = torch.cuda.Stream(device)
        self._kv_copies: deque[tuple[torch.cuda.Event, frozenset[int]]] = deque()  # in order; their blocks

    def _map(self, path: str, size: int) -> torch.Tensor:
        # Shared: page-locking a private mapping would copy it.
        image = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self._image_locks.lock(image)
        return image

    def _release(self, image: torch.Tensor) -> None:
        self._stream.synchronize()  # a copy may still read it
        self._image_locks.unlock(image)

    def close(self) -> None:
        """As `Device.close`."""
        torch.cuda.synchronize(self.torch_device)
        super().close()

    def _start(self, image: torch.Tensor, extents: tuple[Extent, ...]) -> Copy:
        self._after_steps()
        return _CudaCopy(self._stream, self.arena, image, extents)

    def _copy_kv(self, pairs: Iterable[Pair], blocks: Sequence[int]) -> Done:
        """As `Device._copy_kv`, on the copy stream: copies are carried out in order, weights included."""
        self._after_steps()
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        event = self._stream.record_event()
        self._kv_copies.append((event, frozenset(blocks)))
        return lambda: bool(event.query())

    def wait_for(self, tables: Iterable[Sequence[int]]) -> None:
        """As `Device.wait_for`. Steps whose blocks are not being copied do not wait."""
        while self._kv_copies and self._kv_copies[0][0].query():
            self._kv_copies.popleft()
        if not self._kv_copies:
            return
        wanted = frozenset().union(*tables)
        for event, blocks in reversed(self._kv_copies):
            if not blocks.isdisjoint(wanted):  # earlier copies of the stream are done by then too
                torch.cuda.current_stream(self.torch_device).wait_event(event)
                return

    def release_caches(self) -> None:
        torch.cuda.empty_cache()

    def fetch(self, tensor: torch.Tensor) -> Arriving:
        return _Flying(tensor)

    def _after_steps(self) -> None:
        """Copies from here on wait: the ledger reuses blocks that earlier steps may still read."""
        self._stream.wait_event(torch.cuda.current_stream(self.torch_device).record_event())


class _Flying(Arriving):
    """On their way into page-locked memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.current_stream(tensor.device).record_event()

    def arrived(self) -> bool:
        return bool(self._event.query())

    def take(self) -> list[int]:
        self._event.synchronize()
        numbers: list[int] = self._host.tolist()
        return numbers


class _PageLocks:
    """Page-locks memory of a kind (`name`), as `memory.Locks`. What is locked has to be unlocked before it is
    unmapped: the driver would take whatever is mapped there next for the pages that it knows."""

    def __init__(self, name: str) -> None:
        self._name = name

    def lock(self, memory: torch.Tensor) -> None:
        """Raises RuntimeError when the driver refuses."""
        error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if error != 0:
            _forget_error()
            raise RuntimeError(f"{self._name} cannot be page-locked (CUDA error {error})")

    def unlock(self, memory: torch.Tensor) -> None:
        """Nothing may be copying from or to it."""
        if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) != 0:
            _forget_error()


def _forget_error() -> None:
    """The runtime keeps a refused call's error for the next launch to report, which would be a step's."""
    with suppress(torch.AcceleratorError):
        torch.ones(1, device="cuda")  # reports it, by which it is gone
    torch.cuda.synchronize()  # raises where the CUDA context is lost


class _CudaCopy(Copy):
    """A few chunks in flight at most, so that stopping and steps never wait for long."""

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
        if len(self._flying) > _CHUNKS_IN_FLIGHT:
            self._flying.popleft().synchronize()
        return size

    def stop(self) -> None:
        """Waits for the chunks in flight."""
        self._stream.synchronize()

"""A GPU as a device.

Owns its streams, page locks and synchronisation. Must not know models or messages.

It has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from seallmd.core.messages import Extent, WorkerSettings
from seallmd.worker.device import CHUNK_BYTES, Arriving, Copy, Device, Done, Pair, chunks
from seallmd.worker.memory import HostKv, Locks
from seallmd.worker.process import is_device_lost, tell

_CHUNKS_IN_FLIGHT = 16  # what stopping, and KV behind them on the stream, may have to wait for


class CudaDevice(Device):
    """A GPU. Images are page-locked once, chunk by chunk."""

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
        self._locked: dict[int, _LockedImage] = {}  # by address
        self._stream = torch.cuda.Stream(device)
        self._kv_copies: deque[tuple[torch.cuda.Event, frozenset[int]]] = deque()  # in order; their blocks

    def _map(self, path: str, size: int) -> torch.Tensor:
        # Shared: page-locking a private mapping would copy it.
        image = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self._locked[image.data_ptr()] = _LockedImage(image, _PageLocks("the host image"))
        return image

    def _release(self, image: torch.Tensor) -> None:
        self._stream.synchronize()  # a copy may still read it
        self._locked.pop(image.data_ptr()).unlock()

    def close(self) -> None:
        """As `Device.close`."""
        torch.cuda.synchronize(self.torch_device)
        super().close()

    def _start(self, image: torch.Tensor, extents: tuple[Extent, ...]) -> Copy:
        self._after_steps()
        return _CudaCopy(self._stream, self.arena, self._locked[image.data_ptr()], extents)

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


class _LockedImage:
    """A mapped image, page-locked chunk by chunk when copies first get there: all at once would take a second
    for some GiB, in which no other service's step is sent."""

    def __init__(self, image: torch.Tensor, locks: Locks) -> None:
        self._image, self._locks = image, locks
        self._chunks: dict[int, torch.Tensor] = {}  # that are locked, by their first byte
        self._refused = False

    def part(self, at: int, size: int) -> torch.Tensor:
        """Bytes of one chunk, to be copied from. Where the driver refuses to lock them that takes longer."""
        first = at - at % CHUNK_BYTES
        if first not in self._chunks and not self._refused:
            self._lock(first, self._image[first : first + CHUNK_BYTES])
        return self._image[at : at + size]

    def _lock(self, first: int, chunk: torch.Tensor) -> None:
        try:
            self._locks.lock(chunk)
        except RuntimeError as error:
            if is_device_lost(error):
                raise
            self._refused = True
            tell(str(error))
            return
        self._chunks[first] = chunk

    def unlock(self) -> None:
        """Before it is unmapped; nothing may be copying from it."""
        for chunk in self._chunks.values():
            self._locks.unlock(chunk)
        self._chunks.clear()


class _CudaCopy(Copy):
    """A few chunks in flight at most, so that stopping and steps never wait for long."""

    def __init__(
        self,
        stream: torch.cuda.Stream,
        arena: torch.Tensor,
        image: _LockedImage,
        extents: tuple[Extent, ...],
    ) -> None:
        self._stream, self._arena, self._image = stream, arena, image
        self._chunks = chunks(extents)
        self._flying: deque[torch.cuda.Event] = deque()

    def advance(self) -> int:
        """Enqueues one chunk; at the end waits for the last."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self.stop()
            return 0
        to, at, size = chunk
        source = self._image.part(at, size)
        with torch.cuda.stream(self._stream):
            self._arena[to : to + size].copy_(source, non_blocking=True)
        self._flying.append(self._stream.record_event())
        if len(self._flying) > _CHUNKS_IN_FLIGHT:
            self._flying.popleft().synchronize()
        return size

    def stop(self) -> None:
        """Waits for the chunks in flight."""
        self._stream.synchronize()

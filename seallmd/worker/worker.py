"""A device's worker: carries out the daemon's messages one by one.

Owns which services are resident, and the copies under way. Must not know sockets, processes or why it is
asked for anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from seallmd.core.messages import (
    Admit,
    BlocksCopied,
    CopyDone,
    CopyFailed,
    CopyIn,
    DropImage,
    DropWeights,
    Forget,
    JobProgress,
    Message,
    MoveBlocks,
    Ping,
    Pong,
    RestoreBlocks,
    SaveBlocks,
    Step,
    StepDone,
    StepFailed,
    WorkerSettings,
)
from seallmd.worker import forward, grammar
from seallmd.worker.device import Copy, Device, Done
from seallmd.worker.graphs import Graphs, Recorder
from seallmd.worker.group import GroupLost, Joining, ProcessGroup
from seallmd.worker.kv import KvView
from seallmd.worker.models import Model, Models
from seallmd.worker.process import is_device_lost, is_out_of_memory, log_line, one_line
from seallmd.worker.requests import Packed, Requests
from seallmd.worker.skeleton import load_config
from seallmd.worker.static_steps import Shape

_TELL_BYTES = 64 << 20  # of a copy, between two reports of its progress


@dataclass
class _Flight:
    """A step on the device, whose tokens the host has not read."""

    step: Step
    packed: Packed
    outcome: forward.Outcome
    started: float
    leads: bool  # whether this rank tells the tokens


@dataclass(eq=False)
class _Arrival:
    """A service being copied in.

    image: what it may compute from before all has been copied; None where it may not. bound: it does.
    """

    wanted: CopyIn
    copy: Copy
    config: Future[PreTrainedConfig] | None  # None when its module tree is at hand
    joining: Joining | None  # None for a service on one device
    image: torch.Tensor | None
    started: float | None = None
    done_bytes: int = 0
    told_bytes: int = 0
    copied: bool = False
    bound: bool = False

    def may_bind(self) -> bool:
        """Whether it can compute from now on; it must not wait for an import, nor for the other ranks."""
        if self.bound or not (self.copied or self.image is not None):
            return False
        importing = self.config is not None and not self.config.done()
        return not importing and (self.joining is None or self.joining.done())

    def parts(self) -> tuple[PreTrainedConfig | None, ProcessGroup | None]:
        """What it waited for. Raises what kept it from coming."""
        config = None if self.config is None else self.config.result()
        return config, None if self.joining is None else self.joining.take()

    def stop(self) -> None:
        """It is not wanted any more."""
        self.copy.stop()
        if self.joining is not None and not self.bound:
            self.joining.give_up()


class Worker:
    """Everything a worker process does, without the process. send: takes answers in order.

    recorder: captures graphs of decode steps; None to do without.
    """

    def __init__(
        self,
        device: Device,
        settings: WorkerSettings,
        send: Callable[[Message], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._device = device
        self._rendezvous = Path(settings.rendezvous)
        self._block_bytes = settings.block_bytes
        self._threads = settings.threads
        self._send = send
        self._requests = Requests()
        self._grammars = grammar.Grammars()
        self._models = Models(device, settings, log_line(settings.name), recorder)
        self._resident: dict[str, Model] = {}
        self._arriving: deque[_Arrival] = deque()
        self._flight: _Flight | None = None
        self._kv_copies: deque[tuple[int, Done, _Flight | None]] = deque()  # number; the step before
        self._landed = 0.0  # when the last step's tokens were read
        # Importing a model's module takes up to a second: beside the copy, not after it.
        self._importer = ThreadPoolExecutor(1, thread_name_prefix="importer")

    @property
    def copying(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._arriving)

    @property
    def awaited(self) -> bool:
        """Whether a service cannot serve before its copy is complete."""
        return any(arrival.image is None for arrival in self._arriving)

    @property
    def binding(self) -> bool:
        """Whether what `advance` does next is no copy but a binding, some milliseconds of work or more."""
        return any(arrival.may_bind() for arrival in self._arriving)

    @property
    def unprepared(self) -> bool:
        """Whether `prepare` has something to do."""
        return self._next_graph() is not None

    def prepare(self) -> None:
        """Capture the graph of one more shape that steps are likely to have: some tenths of a second."""
        if (found := self._next_graph()) is not None:
            graphs, shape = found
            graphs.prepare(shape)

    def _next_graph(self) -> tuple[Graphs, Shape] | None:
        for known in self._resident.values():
            if known.graphs is not None and (shape := known.graphs.ahead()) is not None:
                return known.graphs, shape
        return None

    def handle(self, message: Message) -> None:
        """Carry out one message. Raises on what only a defect of the daemon or of the device can cause."""
        match message:
            case Step():
                self._step(message)
            case CopyIn():
                self._copy_in(message)
            case DropWeights():
                self._drop(message.service)
            case DropImage():
                self._device.drop_image(message.service)
            case MoveBlocks():
                self._move(message)
            case SaveBlocks(src, dst, copy):
                self._ask_after(copy, self._device.save(src, dst))
            case RestoreBlocks(src, dst, copy, device):
                self._ask_after(copy, self._device.restore(src, dst, device))
            case Forget():
                self._requests.forget(message.requests)
            case Ping():
                self._send(Pong())
            case _:
                raise RuntimeError(f"no worker message: {type(message).__name__}")

    @property
    def copying_kv(self) -> bool:
        """Whether `tell_copied` will have something to tell."""
        return bool(self._kv_copies)

    def tell_copied(self) -> None:
        """Tell which blocks have been copied; behind the steps that went before."""
        while self._kv_copies and self._kv_copies[0][1]():
            copy, _, before = self._kv_copies.popleft()
            if before is not None and before is self._flight:
                self.land()
            self._send(BlocksCopied(copy))

    def _ask_after(self, copy: int, done: Done) -> None:
        if copy:
            self._kv_copies.append((copy, done, self._flight))

    # -------------------------------------------------------------------------------------------- steps

    @property
    def flying(self) -> bool:
        """Whether a step is on the device whose tokens nobody has read: `land` it, or send the next one."""
        return self._flight is not None

    def arrived(self) -> bool:
        """Whether `land` would not wait."""
        tokens = None if self._flight is None else self._flight.outcome.tokens
        return tokens is None or tokens.arrived()

    def land(self) -> None:
        """Wait for the step on the device, and tell its end."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._tell(flight)

    def _step(self, step: Step) -> None:
        started = time.perf_counter()
        if self._models.native is not None:
            self._models.native.set_threads(step.threads or self._threads)
        if not self._may_follow(step):
            self.land()
        try:
            flight = self._run(step, started)
        except Exception as error:
            if is_device_lost(error):  # with everything in it
                raise
            self.land()  # a failed step is reported, the other services go on
            self._requests.fail([admit.request for admit in step.admit] + [row.request for row in step.rows])
            self._leave(step.service)  # others may be waiting for this rank, and would for long
            memory = is_out_of_memory(error)
            if memory:
                self._device.release_caches()
            self._send(StepFailed(step.step, one_line(error), memory))
            return
        self.land()  # the one before: the device has got its next work
        self._flight = flight
        if not self._device.late:
            self.land()

    def _may_follow(self, step: Step) -> bool:
        """Whether a step may be sent to the device before the last one's tokens are known."""
        resident = self._resident.get(step.service)
        return (
            self._flight is not None
            and resident is not None
            and resident.group is None
            and not self._requests.needs_tokens(step.rows)
        )

    def _tell(self, flight: _Flight) -> None:
        tokens, scores, failed, pooled = flight.outcome
        drawn = [] if tokens is None else tokens.take()
        answer = self._requests.settle(flight.step.rows, flight.packed, drawn)
        begun = max(flight.started, self._landed)  # it waited on the device for the one before
        self._landed = time.perf_counter()
        seconds = self._landed - begun
        if flight.leads:
            self._send(StepDone(flight.step.step, answer, seconds, scores, failed, pooled))
        else:
            self._send(StepDone(flight.step.step, (), seconds))

    def _run(self, step: Step, started: float) -> _Flight:
        resident = self._resident.get(step.service)
        if resident is None or resident.kv is None:
            raise RuntimeError(f"{step.service} is not resident")
        group = resident.group
        if resident.seats and group is None:
            raise GroupLost("its tensor-parallel group is broken")
        self._requests.admit(step.service, step.admit, resident.model.get_input_embeddings().num_embeddings)
        leads = group is None or group.rank == 0  # it draws for all
        if leads:
            self._constrain(step.admit, resident)
        packed = self._requests.pack(step.service, step.rows, resident.kv.page)
        self._device.wait_for(span.table for span in packed.spans)
        outcome = forward.Outcome()
        if packed.rows:
            outcome = self._forward(resident, resident.kv, packed)
        self._requests.advance(packed)
        return _Flight(step, packed, outcome, started, leads)

    def _constrain(self, admits: tuple[Admit, ...], resident: Model) -> None:
        """Begin to compile the grammars of new requests, beside the forward pass."""
        for admit in admits:
            if admit.sampling.grammar is not None:
                vocabulary = resident.model.get_input_embeddings().num_embeddings
                matcher = self._grammars.begin(admit.sampling.grammar, resident.origin.directory, vocabulary)
                self._requests.constrain(admit.request, matcher)

    def _leave(self, service: str) -> None:
        resident = self._resident.get(service)
        if resident is not None:
            resident.leave()

    def _forward(self, resident: Model, kv: KvView, packed: Packed) -> forward.Outcome:
        runner = forward.Runner(resident.model, kv, resident.kernels, resident.graphs, resident.group)
        before = None if self._flight is None else self._flight.outcome.tokens
        return forward.run(self._device, self._models.native, runner, packed, before)

    def _move(self, message: MoveBlocks) -> None:
        self._device.wait_for((message.src, message.dst))
        blocks = self._device.arena.view(-1, self._block_bytes)
        for src, dst in zip(message.src, message.dst, strict=True):
            blocks[dst].copy_(blocks[src])
        self._requests.rename(message.src, message.dst)

    # ----------------------------------------------------------------------------------------- residency

    def _copy_in(self, wanted: CopyIn) -> None:
        service = wanted.service
        try:
            if service in self._resident or any(a.wanted.service == service for a in self._arriving):
                raise RuntimeError("it is here already")
            copy = self._device.copy_in(service, wanted.image, wanted.extents)
        except (RuntimeError, OSError) as error:
            if is_device_lost(error):
                raise
            self._send(CopyFailed(service, one_line(error), wanted.copy))
            return
        config = None
        if not self._models.has(wanted):
            config = self._importer.submit(load_config, Path(wanted.directory))
        joining = None
        if wanted.group is not None:
            joining = Joining(wanted.group, self._device.torch_device, self._rendezvous)
        image = None if self._models.captures else copy.image  # graphs read the arena
        self._arriving.append(_Arrival(wanted, copy, config, joining, image))

    def advance(self) -> bool:
        """Bind what may compute from now on, or do a piece of the oldest copy; False when there is nothing to
        do but wait for others.

        A service that waits for its import or its group holds up no copy behind it.
        """
        for arrival in self._arriving:
            if arrival.may_bind():
                self._bind(arrival)
                return True
        for arrival in self._arriving:
            if not arrival.copied:
                self._copy_piece(arrival)
                return True
        return False

    def _copy_piece(self, arrival: _Arrival) -> None:
        if arrival.started is None:
            arrival.started = time.perf_counter()
        piece = arrival.copy.advance()
        arrival.done_bytes += piece
        arrival.copied = piece == 0
        if arrival.copied and arrival.bound:
            self._models.arrive(arrival.wanted)
            self._arriving.remove(arrival)
        if arrival.copied or arrival.done_bytes >= arrival.told_bytes + _TELL_BYTES:
            arrival.told_bytes = arrival.done_bytes
            total = sum(extent.bytes_ for extent in arrival.wanted.extents)
            self._send(JobProgress(arrival.wanted.service, "copy", arrival.done_bytes, total))

    def _bind(self, arrival: _Arrival) -> None:
        service = arrival.wanted.service
        started = arrival.started or time.perf_counter()
        try:
            image = None if arrival.copied else arrival.image
            known = self._models.bind(arrival.wanted, *arrival.parts(), image)
        except Exception as error:  # a model that cannot be bound must not end its neighbours
            if is_device_lost(error):
                raise
            self._models.forget(service)
            arrival.stop()
            self._arriving.remove(arrival)
            self._send(CopyFailed(service, one_line(error), arrival.wanted.copy))
            return
        self._resident[service], arrival.bound = known, True
        if arrival.copied:
            self._arriving.remove(arrival)
        seconds = time.perf_counter() - started
        self._send(CopyDone(service, seconds, arrival.wanted.copy, known.operations()))

    def _drop(self, service: str) -> None:
        for arrival in list(self._arriving):
            if arrival.wanted.service == service:
                arrival.stop()
                self._arriving.remove(arrival)
        resident = self._resident.pop(service, None)
        if resident is not None:
            resident.unbind()

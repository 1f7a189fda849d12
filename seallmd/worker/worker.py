"""A device's worker: carries out the daemon's messages one by one.

Owns which services are resident, their module trees and the copies under way. Must not know sockets,
processes or why it is asked for anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from seallmd.core.messages import (
    Admit,
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
from seallmd.core.shapes import LayerShape
from seallmd.worker import forward, grammar, ops, quantised
from seallmd.worker.attention import run_recorded
from seallmd.worker.binding import Weights
from seallmd.worker.device import Copy, Device
from seallmd.worker.graphs import GraphPool, Graphs, Recorder
from seallmd.worker.group import GroupLost, Joining, ProcessGroup
from seallmd.worker.kv import KvView
from seallmd.worker.layout import Layout, layout_of
from seallmd.worker.ops import gpu_model
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.model import FastModel, runs_wide, wide_skeleton
from seallmd.worker.parallel import Seat, divide, sit
from seallmd.worker.process import is_out_of_memory, log_line, one_line
from seallmd.worker.requests import Packed, Requests
from seallmd.worker.skeleton import DTYPES, build_skeleton, fix_rope, load_config
from seallmd.worker.static_steps import Shape

_PROBE_CONTEXT = 8  # tokens that every model takes
_TELL_BYTES = 64 << 20  # of a copy, between two reports of its progress


@dataclass
class _Flight:
    """A step on the device, whose tokens the host has not read."""

    step: Step
    packed: Packed
    outcome: forward.Outcome
    started: float
    leads: bool  # whether this rank tells the tokens


class _Origin(NamedTuple):
    """What a module tree follows from. rank and ranks: 0 and 1 without tensor parallelism."""

    directory: str
    dtype: str
    context: int
    rank: int
    ranks: int


@dataclass
class _Model:
    """A service's module tree; kept while its weights are away, since it is small and takes time to build.

    kv: None until the first forward pass has shown what its layers store. wide: the same tree for float32
    arithmetic on 16-bit weights, until the first binding has shown whether it runs. fast: what of the tree
    was replaced by compiled operations. kernels: those of a GPU that its attention runs on. graphs: of its
    decode steps. seats: of the tensor-parallel rank, one in each tree. group: its process group while it is
    resident.
    """

    origin: _Origin
    model: PreTrainedModel
    layout: Layout
    weights: Weights
    kv: KvView | None = None
    wide: PreTrainedModel | None = None
    fast: FastModel | None = None
    kernels: Kernels | None = None
    graphs: Graphs | None = None
    seats: tuple[Seat, ...] = ()
    group: ProcessGroup | None = None

    def operations(self) -> tuple[tuple[str, int], ...]:
        """What was replaced in it, as in `messages.CopyDone`."""
        if self.fast is not None:
            return self.fast.replaced()
        return gpu_model.replaced(self.model, self.kernels, 0 if self.kv is None else self.kv.layers)

    def join(self, group: ProcessGroup) -> None:
        """From here on the layers talk to the other ranks."""
        self.group = group
        for seat in self.seats:
            seat.peers = group

    def leave(self) -> None:
        """Nobody may wait for this rank any longer."""
        if self.group is not None:
            self.group.leave()
        self.group = None
        for seat in self.seats:
            seat.peers = None


@dataclass
class _Arrival:
    """A service being copied in."""

    wanted: CopyIn
    copy: Copy
    config: Future[PreTrainedConfig] | None  # None when its module tree is at hand
    joining: Joining | None  # None for a service on one device
    started: float | None = None
    done_bytes: int = 0
    told_bytes: int = 0
    copied: bool = False

    def waits(self) -> bool:
        """Whether it is here but for an import, or for the other ranks."""
        importing = self.config is not None and not self.config.done()
        return importing or (self.joining is not None and not self.joining.done())

    def stop(self) -> None:
        """It is not wanted any more."""
        self.copy.stop()
        if self.joining is not None:
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
        self._say = log_line(settings.name)
        self._rendezvous = Path(settings.rendezvous)
        self._block_bytes = settings.block_bytes
        self._kv_layout = settings.kv_layout
        self._threads = settings.threads
        self._send = send
        self._requests = Requests()
        self._grammars = grammar.Grammars()
        self._models: dict[str, _Model] = {}
        self._resident: dict[str, _Model] = {}
        self._arriving: deque[_Arrival] = deque()
        self._native = ops.compiled() if device.torch_device.type == "cpu" else None
        self._kernels = ops.gpu_kernels()
        self._pool: GraphPool | None = None
        if recorder is not None and settings.graph_bytes:
            self._pool = GraphPool(recorder, device.torch_device, settings.graph_bytes, self._say)
        self._flight: _Flight | None = None
        self._landed = 0.0  # when the last step's tokens were read
        # Importing a model's module takes up to a second: beside the copy, not after it.
        self._importer = ThreadPoolExecutor(1, thread_name_prefix="importer")

    @property
    def copying(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._arriving)

    @property
    def binding(self) -> bool:
        """Whether what `advance` does next is no copy but a binding, some milliseconds of work or more."""
        return bool(self._arriving) and self._arriving[0].copied

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
            case SaveBlocks(src, dst):
                self._device.save(src, dst)
            case RestoreBlocks(src, dst):
                self._device.restore(src, dst)
            case Forget():
                self._requests.forget(message.requests)
            case Ping():
                self._send(Pong())
            case _:
                raise RuntimeError(f"no worker message: {type(message).__name__}")

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
        if self._native is not None:
            self._native.set_threads(step.threads or self._threads)
        if not self._may_follow(step):
            self.land()
        try:
            flight = self._run(step, started)
        except torch.AcceleratorError:
            raise  # the CUDA context is lost with everything in it: only a new process helps
        except Exception as error:  # noqa: BLE001 - a failed step is reported, the other services go on
            self.land()
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

    def _constrain(self, admits: tuple[Admit, ...], resident: _Model) -> None:
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

    def _forward(self, resident: _Model, kv: KvView, packed: Packed) -> forward.Outcome:
        runner = forward.Runner(resident.model, kv, resident.kernels, resident.graphs, resident.group)
        before = None if self._flight is None else self._flight.outcome.tokens
        return forward.run(self._device, self._native, runner, packed, before)

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
        except torch.AcceleratorError:
            raise
        except (RuntimeError, OSError) as error:
            self._send(CopyFailed(service, one_line(error), wanted.copy))
            return
        known = self._models.get(service)
        config = None
        if known is None or known.origin != _origin(wanted):
            config = self._importer.submit(load_config, Path(wanted.directory))
        joining = None
        if wanted.group is not None:
            joining = Joining(wanted.group, self._device.torch_device, self._rendezvous)
        self._arriving.append(_Arrival(wanted, copy, config, joining))

    def advance(self) -> bool:
        """Do a piece of the oldest copy; False when there is nothing to do but wait for others.

        A service that waits for its import or its group holds up no copy behind it.
        """
        arrival = next((a for a in self._arriving if not (a.copied and a.waits())), None)
        if arrival is None:
            return False
        if arrival.started is None:
            arrival.started = time.perf_counter()
        if not arrival.copied:
            piece = arrival.copy.advance()
            arrival.done_bytes += piece
            arrival.copied = piece == 0
            total = sum(extent.bytes_ for extent in arrival.wanted.extents)
            if piece and (
                arrival.done_bytes == total or arrival.done_bytes >= arrival.told_bytes + _TELL_BYTES
            ):
                arrival.told_bytes = arrival.done_bytes
                self._send(JobProgress(arrival.wanted.service, "copy", arrival.done_bytes, total))
            return True
        if arrival.waits():
            return False
        self._arriving.remove(arrival)
        service = arrival.wanted.service
        try:
            self._resident[service] = self._bound(arrival)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - a model that cannot be bound must not end its neighbours
            self._models.pop(service, None)
            if arrival.joining is not None:
                arrival.joining.give_up()
            self._send(CopyFailed(service, one_line(error), arrival.wanted.copy))
        else:
            seconds = time.perf_counter() - arrival.started
            operations = self._resident[service].operations()
            self._send(CopyDone(service, seconds, arrival.wanted.copy, operations))
        return True

    def _bound(self, arrival: _Arrival) -> _Model:
        wanted = arrival.wanted
        if arrival.config is not None:
            former = self._models.pop(wanted.service, None)
            if former is not None and former.graphs is not None:
                former.graphs.drop()
            self._models[wanted.service] = self._build(wanted, arrival.config.result())
        known = self._models[wanted.service]
        sizes = tuple(extent.bytes_ for extent in wanted.extents)
        if sizes != known.layout.segments:
            raise RuntimeError("the extents do not fit the model")
        known.weights.bind(wanted.extents, self._device.arena)
        if known.kv is None:
            self._settle(known, wanted)
        if known.fast is not None and known.kv is not None:
            known.fast.bind(known.kv)
        if known.graphs is not None:
            known.graphs.place(wanted.extents)
        if arrival.joining is not None:
            known.join(arrival.joining.take())
        return known

    def _settle(self, known: _Model, wanted: CopyIn) -> None:
        """Decide what only the real weights can show; they are bound."""
        if self._native is not None and known.wide is not None:
            weights = Weights(known.wide, known.layout)
            weights.bind(wanted.extents, self._device.arena)
            if runs_wide(known.wide, self._native):
                known.model, known.weights = known.wide, weights
        known.wide = None
        # One token through the real weights: shows each layer's KV shape, and that the binding runs.
        calls, _ = run_recorded(known.model, tokens=1)
        shapes = [LayerShape(call.kv_heads, call.k_dim, call.v_dim) for call in calls]
        if self._native is not None:
            known.fast = FastModel(known.model, self._native)
            known.fast.install(shapes)
        dtype = DTYPES[wanted.dtype]
        known.kv = KvView(self._device.memory, self._block_bytes, shapes, dtype, self._kv_layout)
        if self._kernels is not None:
            limit = wanted.context or _PROBE_CONTEXT
            known.kernels = gpu_model.install(known.model, known.kv, limit, self._kernels, self._say)
        if self._pool is not None and wanted.group is None:
            known.graphs = Graphs(
                self._pool, known.model, known.kv, known.kernels, self._device.scratch, wanted.context
            )

    def _build(self, wanted: CopyIn, config: PreTrainedConfig) -> _Model:
        dtype = DTYPES[wanted.dtype]
        model = build_skeleton(config, dtype, self._device.torch_device)
        fix_rope(model, wanted.context)
        wide = None
        if self._native is not None and dtype.itemsize == 2:
            wide = wide_skeleton(config, model)
            fix_rope(wide, wanted.context)
        seats = ()
        if wanted.group is not None:
            division = divide(model, wanted.group.rank, wanted.group.ranks)
            seats = tuple(sit(tree, division) for tree in (model, wide) if tree is not None)
        if wanted.dtype == quantised.NAME:  # a rank's part by itself
            for tree in (model, wide):
                if tree is not None:
                    quantised.quantise(tree)
        layout = layout_of(model)
        return _Model(_origin(wanted), model, layout, Weights(model, layout), wide=wide, seats=seats)

    def _drop(self, service: str) -> None:
        for arrival in list(self._arriving):
            if arrival.wanted.service == service:
                arrival.stop()
                self._arriving.remove(arrival)
        resident = self._resident.pop(service, None)
        if resident is not None:
            if resident.fast is not None:
                resident.fast.unbind()
            resident.leave()
            resident.weights.unbind()


def _origin(wanted: CopyIn) -> _Origin:
    group = wanted.group
    rank, ranks = (0, 1) if group is None else (group.rank, group.ranks)
    return _Origin(wanted.directory, wanted.dtype, wanted.context, rank, ranks)

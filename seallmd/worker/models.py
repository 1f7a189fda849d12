"""The module trees of a device's services: built once, given their weights whenever these come in.

Owns what of a tree follows from the model alone, and what only its real weights can show. Must not know
steps, nor how weights come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from seallmd.core.messages import CopyIn, WorkerSettings
from seallmd.core.shapes import LayerShape
from seallmd.worker import ops, quantised
from seallmd.worker.attention import run_recorded
from seallmd.worker.binding import Location, Weights
from seallmd.worker.device import Device
from seallmd.worker.graphs import GraphPool, Graphs, Recorder
from seallmd.worker.group import ProcessGroup
from seallmd.worker.kv import KvView
from seallmd.worker.layout import Layout, layout_of
from seallmd.worker.ops import gpu_model
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.model import FastModel, runs_wide, wide_skeleton
from seallmd.worker.parallel import Seat, divide, sit
from seallmd.worker.skeleton import DTYPES, build_skeleton, fix_rope

_PROBE_CONTEXT = 8  # tokens that every model takes


class Origin(NamedTuple):
    """What a module tree follows from. rank and ranks: 0 and 1 without tensor parallelism."""

    directory: str
    dtype: str
    context: int
    rank: int
    ranks: int


@dataclass
class Model:
    """A service's module tree; kept while its weights are away, since it is small and takes time to build.

    kv: None until the first forward pass has shown what its layers store. wide: the same tree for float32
    arithmetic on 16-bit weights, until the first binding has shown whether it runs. fast: what of the tree
    was replaced by compiled operations. kernels: those of a GPU that its attention runs on. graphs: of its
    decode steps. seats: of the tensor-parallel rank, one in each tree. group: its process group while it is
    resident.
    """

    origin: Origin
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

    def bind(self, at: Location) -> None:
        """Its weights are here from now on."""
        self.weights.bind(at)
        if self.fast is not None and self.kv is not None:
            self.fast.bind(self.kv)

    def unbind(self) -> None:
        """Its weights' places belong to others."""
        if self.fast is not None:
            self.fast.unbind()
        self.leave()
        self.weights.unbind()


class Models:
    """Every tree that was built on a device. recorder: captures graphs; None to do without."""

    def __init__(
        self,
        device: Device,
        settings: WorkerSettings,
        say: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._device = device
        self._say = say
        self._block_bytes = settings.block_bytes
        self._kv_layout = settings.kv_layout
        self._known: dict[str, Model] = {}
        self.native = ops.compiled() if device.torch_device.type == "cpu" else None
        self._kernels = ops.gpu_kernels()
        self._pool: GraphPool | None = None
        if recorder is not None and settings.graph_bytes:
            self._pool = GraphPool(recorder, device.torch_device, settings.graph_bytes, say)

    @property
    def captures(self) -> bool:
        """Whether models have graphs."""
        return self._pool is not None

    def has(self, wanted: CopyIn) -> bool:
        """Whether the tree of what comes in is there."""
        known = self._known.get(wanted.service)
        return known is not None and known.origin == _origin(wanted)

    def forget(self, service: str) -> None:
        """Do not use its tree again."""
        self._known.pop(service, None)

    def bind(
        self,
        wanted: CopyIn,
        config: PreTrainedConfig | None,
        group: ProcessGroup | None,
        image: torch.Tensor | None = None,
    ) -> Model:
        """Give a service's tree its weights. config: None where the tree is there.

        image: what to compute from until `arrive`; None when the weights have been copied. Raises
        RuntimeError, and whatever a model raises that does not run.
        """
        if config is not None:
            former = self._known.pop(wanted.service, None)
            if former is not None and former.graphs is not None:
                former.graphs.drop()
            self._known[wanted.service] = self._build(wanted, config)
        known = self._known[wanted.service]
        sizes = tuple(extent.bytes_ for extent in wanted.extents)
        if sizes != known.layout.segments:
            raise RuntimeError("the extents do not fit the model")
        at = self._in_arena(wanted) if image is None else _in_image(wanted, image)
        known.bind(at)
        if known.kv is None:
            self._settle(known, wanted, at)
            known.bind(at)
        if known.graphs is not None:
            known.graphs.place(wanted.extents)
        if group is not None:
            known.join(group)
        return known

    def arrive(self, wanted: CopyIn) -> None:
        """From here on compute from the arena: the weights have been copied."""
        self._known[wanted.service].bind(self._in_arena(wanted))

    def _in_arena(self, wanted: CopyIn) -> Location:
        return Location(self._device.arena, tuple(extent.arena_at for extent in wanted.extents))

    def _settle(self, known: Model, wanted: CopyIn, at: Location) -> None:
        """Decide what only the real weights can show; they are bound, and here."""
        if self.native is not None and known.wide is not None:
            weights = Weights(known.wide, known.layout)
            weights.bind(at)
            if runs_wide(known.wide, self.native):
                known.model, known.weights = known.wide, weights
        known.wide = None
        # One token through the real weights: shows each layer's KV shape, and that the binding runs.
        calls, _ = run_recorded(known.model, tokens=1)
        shapes = [LayerShape(call.kv_heads, call.k_dim, call.v_dim) for call in calls]
        context = wanted.context or _PROBE_CONTEXT
        if self.native is not None:
            known.fast = FastModel(known.model, self.native)
            known.fast.install(shapes, context)
        dtype = DTYPES[wanted.dtype]
        known.kv = KvView(self._device.memory, self._block_bytes, shapes, dtype, self._kv_layout)
        if self._kernels is not None:
            known.kernels = gpu_model.install(known.model, known.kv, context, self._kernels, self._say)
        if self._pool is not None and wanted.group is None:
            known.graphs = Graphs(
                self._pool, known.model, known.kv, known.kernels, self._device.scratch, wanted.context
            )

    def _build(self, wanted: CopyIn, config: PreTrainedConfig) -> Model:
        dtype = DTYPES[wanted.dtype]
        model = build_skeleton(config, dtype, self._device.torch_device)
        fix_rope(model, wanted.context)
        wide = None
        if self.native is not None and dtype.itemsize == 2:
            wide = wide_skeleton(config, model)
            fix_rope(wide, wanted.context)
        seats: tuple[Seat, ...] = ()
        if wanted.group is not None:
            division = divide(model, wanted.group.rank, wanted.group.ranks)
            seats = tuple(sit(tree, division) for tree in (model, wide) if tree is not None)
        if wanted.dtype == quantised.NAME:  # a rank's part by itself
            for tree in (model, wide):
                if tree is not None:
                    quantised.quantise(tree)
        layout = layout_of(model)
        return Model(_origin(wanted), model, layout, Weights(model, layout), wide=wide, seats=seats)


def _in_image(wanted: CopyIn, image: torch.Tensor) -> Location:
    return Location(image, tuple(extent.image_at for extent in wanted.extents))


def _origin(wanted: CopyIn) -> Origin:
    group = wanted.group
    rank, ranks = (0, 1) if group is None else (group.rank, group.ranks)
    return Origin(wanted.directory, wanted.dtype, wanted.context, rank, ranks)

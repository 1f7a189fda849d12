"""Steps replayed from captured graphs.

Owns when graphs are made, used again and thrown away, and the buffers that all of them read steps from and
leave logits in. What a step looks like that can be captured is told by `static_steps`; how it is captured is
the recorder's business: nothing here calls CUDA, so all of it is tested on a CPU.

A shape runs as it is the first time (which also makes whatever is made once), is captured the second time,
and replayed from then on. Likely shapes are captured ahead, while the device has nothing else to do, others
when steps have them. Weights are read at their places in the arena, so a model that comes back to its former
place keeps its graphs, and loses them at any other. Block tables are data: moved blocks do not matter.

Steps with prompt chunks run in the ordinary way beside their first run as a shape: only where both agree are
such steps captured.

Must not know messages or how blocks are given out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from seallmd.worker.kv import KvView
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.trials import TOLERANCES, difference
from seallmd.worker.process import is_device_lost, one_line
from seallmd.worker.requests import Packed
from seallmd.worker.static_steps import (
    MixedShape,
    Shape,
    Site,
    StaticStep,
    decode_shape,
    shape_for,
    static_step,
)
from seallmd.worker.transfer import to_device

_MOST_GRAPHS = 256
_AHEAD_ROWS = (1, 2, 4, 8, 16, 32)  # captured before a step has them, for contexts of up to so many tokens:
_AHEAD_TOKENS = 8192
_MOST_NUMBERS = 1 << 21  # of a step's description, 8 MiB: in 256 rows, 8,000 blocks each


class Uncapturable(Exception):
    """The model's forward pass cannot be captured, and why."""


class Graph(Protocol):
    """A captured function."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Captures functions that read and write the same tensors every time."""

    def capture(self, function: Callable[[], object]) -> Graph:
        """Raises Uncapturable; the device is as good as before then."""

    def spent(self) -> int:
        """Bytes of device memory that all captured graphs have taken so far."""


class GraphPool:
    """What the graphs of all models of a worker share: buffers, bounds and the recorder.

    limit_bytes: no graph is captured beyond that. say: told what falls back.
    """

    def __init__(
        self, recorder: Recorder, device: torch.device, limit_bytes: int, say: Callable[[str], None]
    ) -> None:
        self._recorder, self._limit, self.say = recorder, limit_bytes, say
        self.device = device
        self.numbers = torch.zeros(_MOST_NUMBERS, dtype=torch.int32, device=device)
        self._logits = torch.empty(0, dtype=torch.uint8, device=device)
        # How to drop each graph, the one unused for longest first.
        self._used: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._full = False

    @property
    def full(self) -> bool:
        """Whether a further graph would be refused, or push another out."""
        return self._full or len(self._used) >= _MOST_GRAPHS

    def capture(
        self, name: Hashable, function: Callable[[], object], drop: Callable[[], None]
    ) -> Graph | None:
        """A graph of `function`, None where memory is spent. drop: called when the graph has to go."""
        if self._full:
            return None
        if self._recorder.spent() >= self._limit:
            self._full = True
            self.say("graphs have taken all the memory that they may: further shapes run without")
            return None
        while len(self._used) >= _MOST_GRAPHS:
            self._used.popitem(last=False)[1]()
        graph = self._recorder.capture(function)
        self._used[name] = drop
        return graph

    def touch(self, name: Hashable) -> None:
        """This graph was used just now."""
        self._used.move_to_end(name)

    def forget(self, name: Hashable) -> None:
        """This graph is gone."""
        self._used.pop(name, None)

    def logits(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of that shape, shared by all graphs: whoever replays one reads it before the next."""
        bytes_ = shape[0] * shape[1] * dtype.itemsize
        if bytes_ > self._logits.numel():  # graphs made before keep the old one
            self._logits = torch.empty(2 * bytes_, dtype=torch.uint8, device=self.device)
        return self._logits[:bytes_].view(dtype).view(shape)


@dataclass
class _Slot:
    """One shape of one model. logits: where its graph leaves them."""

    step: StaticStep
    logits: torch.Tensor | None = None
    graph: Graph | None = None


class Graphs:
    """The graphs of one model. scratch: a block of the arena that nobody owns. context: tokens that a request
    may have at most."""

    def __init__(
        self,
        pool: GraphPool,
        model: PreTrainedModel,
        kv: KvView,
        kernels: Kernels | None,
        scratch: int,
        context: int,
    ) -> None:
        self._pool, self._kv, self._kernels = pool, kv, kernels
        self._site = Site(pool.numbers, model, kv, kernels, scratch)
        self._slots: dict[Shape, _Slot] = {}
        self._place: Hashable = None
        self._refused = False
        self._growth = 2 if kernels is None else 4  # plain attention reads the whole width
        self._mixes = kernels is not None  # whether steps with chunks may be captured
        self._likely = self._shapes_ahead(context)

    def place(self, where: Hashable) -> None:
        """The weights were bound, at places that `where` stands for."""
        if where != self._place:
            self.drop()
        self._place = where

    def drop(self) -> None:
        """Throw every graph away."""
        for shape in list(self._slots):
            self._drop(shape)

    def __len__(self) -> int:
        """How many there are."""
        return sum(slot.graph is not None for slot in self._slots.values())

    def run(
        self,
        packed: Packed,
        feed: Callable[[torch.Tensor], None],
        ordinary: Callable[[], torch.Tensor],
    ) -> torch.Tensor | None:
        """Logits of the sampling rows; None for a step that has to run in the ordinary way.

        feed: puts ids that the host does not know into a tensor of the rows' ids. ordinary: runs the step in
        that way. The logits are valid until the next call for any model.
        """
        shape = self._shape(packed)
        if shape is None:
            return None
        if self._kernels is None:
            self._kv.clear(packed.fresh)
        if isinstance(shape, MixedShape) and shape not in self._slots:
            return self._compared(shape, packed, feed, ordinary) if packed.last else None
        logits = self._try(shape, packed, feed)
        if logits is None:
            return None
        if isinstance(shape, MixedShape) or packed.last == list(range(len(packed.ids))):
            return logits[: len(packed.last)]
        return logits[to_device(packed.last, logits.device, torch.long)]

    def ahead(self) -> Shape | None:
        """The next likely shape that has no graph yet; None where all have, or no more are captured."""
        if self._refused or self._pool.full:
            return None
        return next((shape for shape in self._likely if not self._is_captured(shape)), None)

    def prepare(self, shape: Shape) -> None:
        """Bring a shape to where steps of it are replayed, with rows that are all padding."""
        try:
            with torch.inference_mode():
                for _ in range(2):  # as it is, then captured
                    self._try(shape, Packed(), lambda _: None)
        except Exception as error:  # it fails in many ways, and nobody has asked for it
            if is_device_lost(error):
                raise
            self._likely = []
            self._drop(shape)
            self._say("graphs", f"are not captured ahead any more: {one_line(error)}")

    def _shapes_ahead(self, context: int) -> list[Shape]:
        """Few rows before many, short contexts before long ones."""
        widths, most = [4], self._kv.page.holding(min(context, _AHEAD_TOKENS))
        while widths[-1] < most:
            widths.append(widths[-1] * self._growth)
        shapes = (decode_shape(rows, width) for rows in _AHEAD_ROWS for width in widths)
        return [shape for shape in shapes if shape is not None and self._fits(shape)]

    def _shape(self, packed: Packed) -> Shape | None:
        if self._refused:
            return None
        shape = shape_for(packed.spans, self._kv.page, self._growth, self._mixes)
        return shape if shape is not None and self._fits(shape) else None

    def _fits(self, shape: Shape) -> bool:
        return shape.numbers(self._kv.page.blocks) <= _MOST_NUMBERS

    def _is_captured(self, shape: Shape) -> bool:
        slot = self._slots.get(shape)
        return slot is not None and slot.graph is not None

    def _compared(
        self,
        shape: MixedShape,
        packed: Packed,
        feed: Callable[[torch.Tensor], None],
        ordinary: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Run the step in both ways; where they differ, such steps are never captured."""
        expected, problem = ordinary(), ""
        try:
            found = self._try(shape, packed, feed)
            off = 0.0 if found is None else difference(found[: len(packed.last)], expected)
            if off > TOLERANCES[self._kv.dtype]:
                problem = f"their logits are off by {off:.1e}"
        except Exception as error:  # compilers fail in many ways, and the ordinary way has run
            if is_device_lost(error):
                raise
            problem = one_line(error)
        if problem:
            self._refuse(shape, problem)
        return expected

    def _try(self, shape: Shape, packed: Packed, feed: Callable[[torch.Tensor], None]) -> torch.Tensor | None:
        """Logits of a step; None where it turned out that the model cannot be captured."""
        if shape not in self._slots:
            self._slots[shape] = _Slot(static_step(self._site, shape))
        slot = self._slots[shape]
        slot.step.fill(packed)
        feed(slot.step.ids)
        try:
            return self._advance(shape, slot)
        except Uncapturable as error:
            self._refuse(shape, str(error))
            return None

    def _refuse(self, shape: Shape, reason: str) -> None:
        """No more graphs: of steps with chunks, if it is such a shape that is in trouble, or of any."""
        if isinstance(shape, MixedShape):
            self._mixes, which = False, "steps with prompts"
        else:
            self._refused, which = True, "decode steps"
        for known in [s for s in self._slots if self._refused or isinstance(s, MixedShape)]:
            self._drop(known)
        self._say(which, f"run without graphs: {reason}")

    def _say(self, which: str, what: str) -> None:
        self._pool.say(f"{which} of {self._site.model.config.model_type} {what}")

    def _advance(self, shape: Shape, slot: _Slot) -> torch.Tensor:
        """Run what was filled in as far as its shape has come: as it is, captured, or replayed."""
        if slot.logits is None:
            logits = slot.step.run()
            slot.logits = self._pool.logits((logits.shape[0], logits.shape[1]), logits.dtype)
            return logits
        name, target = (id(self), shape), slot.logits
        if slot.graph is None:
            slot.graph = self._pool.capture(
                name, lambda: target.copy_(slot.step.run()), lambda: self._drop(shape)
            )
        else:
            self._pool.touch(name)
        if slot.graph is None:
            return slot.step.run()
        slot.graph.replay()
        return target

    def _drop(self, shape: Shape) -> None:
        self._slots.pop(shape, None)
        self._pool.forget((id(self), shape))

"""Decode steps replayed from captured graphs.

Owns which steps are: those of single tokens, padded to one of a few shapes; the static buffers that a graph
reads its step from and leaves its logits in; and when graphs are made, used again and thrown away. How a
graph is captured is the recorder's business: nothing here calls CUDA, so all of it is tested on a CPU.

A shape runs as it is the first time (which also makes whatever is made once), is captured the second time,
and replayed from then on. Likely shapes are captured ahead, while the device has nothing else to do, others
when steps have them. Weights are read at their places in the arena, so a model that comes back to its former
place keeps its graphs, and loses them at any other. Block tables are data: moved blocks do not matter. Rows
that pad a step write K and V into a block that nobody owns.

Must not know messages or how blocks are given out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from seallmd.worker.attention import answered_by
from seallmd.worker.kv import KvView
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.process import one_line
from seallmd.worker.requests import Packed
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import decode_tables
from seallmd.worker.transfer import to_device

MOST_ROWS = 256
_MOST_GRAPHS = 256
_AHEAD_ROWS = (1, 2, 4, 8, 16, 32)  # captured before a step has them, for contexts of up to so many tokens:
_AHEAD_TOKENS = 8192
_MOST_NUMBERS = 1 << 21  # of a step's description, 8 MiB: in 256 rows, 8,000 blocks each


class Shape(NamedTuple):
    """What a graph is made for: rows, and pages of the widest block table."""

    rows: int
    pages: int


def shape_for(rows: int, pages: int, growth: int) -> Shape | None:
    """The smallest shape that holds a step, None for one of too many rows. growth: from width to width."""
    if rows > MOST_ROWS:
        return None
    padded = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    width = 4
    while width < pages:
        width *= growth
    return Shape(padded, width)


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
    """One shape of one model. run: the forward pass. logits: where its graph leaves them."""

    run: Callable[[], torch.Tensor]
    logits: torch.Tensor
    graph: Graph | None = None


class DecodeGraphs:
    """The graphs of one model. scratch: a block of the arena that nobody owns."""

    def __init__(
        self, pool: GraphPool, model: PreTrainedModel, kv: KvView, kernels: Kernels | None, scratch: int
    ) -> None:
        self._pool, self._model, self._kv, self._kernels = pool, model, kv, kernels
        self._scratch = scratch
        self._slots: dict[Shape, _Slot] = {}
        self._place: Hashable = None
        self._refused = False

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

    def run(self, packed: Packed, feed: Callable[[torch.Tensor], None]) -> torch.Tensor | None:
        """Logits of the sampling rows; None for a step that has to run in the ordinary way.

        feed: puts ids that the host does not know into a tensor of the rows' ids. The logits are valid until
        the next call for any model.
        """
        shape = self._shape(packed)
        if shape is None:
            return None
        if self._kernels is None:
            self._kv.clear(packed.fresh)
        self._fill(shape, packed)
        feed(self._pool.numbers[: shape.rows])
        logits = self._try(shape)
        if logits is None:
            return None
        if packed.last == list(range(len(packed.ids))):
            return logits[: len(packed.ids)]
        return logits[to_device(packed.last, logits.device, torch.long)]

    def ahead(self, context: int) -> Shape | None:
        """The next likely shape that has no graph yet: few rows before many, short contexts before long ones.

        context: tokens that a request may have at most. None where all are there, or no more are captured.
        """
        if self._refused or self._pool.full:
            return None
        most = self._kv.page.holding(min(context, _AHEAD_TOKENS))
        widths = [4]
        while widths[-1] < most:
            widths.append(widths[-1] * self._growth)
        shapes = (Shape(rows, width) for rows in _AHEAD_ROWS for width in widths)
        return next((shape for shape in shapes if self._fits(shape) and not self._is_captured(shape)), None)

    def prepare(self, shape: Shape) -> None:
        """Bring a shape to where steps of it are replayed, with rows that are all padding."""
        try:
            with torch.inference_mode():
                self._fill(shape, Packed())
                for _ in range(2):  # as it is, then captured
                    self._try(shape)
        except torch.AcceleratorError:
            raise  # the CUDA context is lost
        except RuntimeError as error:  # memory may not suffice for so many rows, and nobody asked for them
            self._refuse(one_line(error))

    def _shape(self, packed: Packed) -> Shape | None:
        if self._refused or len(packed.ids) != len(packed.spans):
            return None
        pages = max(self._kv.page.holding(span.context) for span in packed.spans)
        shape = shape_for(len(packed.spans), pages, self._growth)
        return shape if shape is not None and self._fits(shape) else None

    @property
    def _growth(self) -> int:
        return 2 if self._kernels is None else 4

    def _fits(self, shape: Shape) -> bool:
        return shape.rows * (2 + shape.pages * self._kv.page.blocks) <= _MOST_NUMBERS

    def _fill(self, shape: Shape, packed: Packed) -> None:
        """Ids, contexts and block tables into the buffer that graphs read, in one copy."""
        rows, width = shape.rows, shape.pages * self._kv.page.blocks
        # A new one each time: the last may still be on its way to the device.
        host = torch.empty(rows * (2 + width), dtype=torch.int32, pin_memory=self._pool.device.type == "cuda")
        numbers = host.numpy()
        ids, contexts, blocks = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
        table = blocks.reshape(rows, width)
        real = len(packed.spans)
        ids[:real], ids[real:] = packed.ids, 0
        contexts[:real], contexts[real:] = [span.context for span in packed.spans], 1
        table[real:] = self._scratch
        for row, span in enumerate(packed.spans):
            used = self._kv.page.holding(span.context) * self._kv.page.blocks
            table[row, :used] = span.table[:used]
            table[row, used:] = span.table[0]  # plain attention reads it under a mask, so it must be finite
        self._pool.numbers[: len(numbers)].copy_(host, non_blocking=True)

    def _is_captured(self, shape: Shape) -> bool:
        slot = self._slots.get(shape)
        return slot is not None and slot.graph is not None

    def _try(self, shape: Shape) -> torch.Tensor | None:
        """Logits of what was filled in; None where it turned out that the model cannot be captured."""
        try:
            return self._advance(shape)
        except Uncapturable as error:
            self._refuse(str(error))
            return None

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self.drop()
        self._pool.say(f"decode steps of {self._model.config.model_type} run without graphs: {reason}")

    def _advance(self, shape: Shape) -> torch.Tensor:
        """Run the shape as far as it has come: as it is, captured, or replayed."""
        slot = self._slots.get(shape)
        if slot is None:
            run = self._function(shape)
            logits = run()
            target = self._pool.logits((logits.shape[0], logits.shape[1]), logits.dtype)
            self._slots[shape] = _Slot(run, target)
            return logits
        name = (id(self), shape)
        if slot.graph is None:
            slot.graph = self._pool.capture(
                name, lambda: slot.logits.copy_(slot.run()), lambda: self._drop(shape)
            )
        else:
            self._pool.touch(name)
        if slot.graph is None:
            return slot.run()
        slot.graph.replay()
        return slot.logits

    def _drop(self, shape: Shape) -> None:
        self._slots.pop(shape, None)
        self._pool.forget((id(self), shape))

    def _function(self, shape: Shape) -> Callable[[], torch.Tensor]:
        """The forward pass over the static buffers; what it makes itself, it makes in every run."""
        rows, width = shape.rows, shape.pages * self._kv.page.blocks
        numbers, model, kv, kernels = self._pool.numbers, self._model, self._kv, self._kernels
        ids, contexts = numbers[:rows], numbers[rows : 2 * rows]
        table = numbers[2 * rows : rows * (2 + width)].view(rows, width)
        fixed = decode_tables(table, contexts, shape.pages * kv.page.tokens)

        def run() -> torch.Tensor:
            tables = fixed.at(contexts - 1)
            with answered_by(TableBatch(kv, tables, kernels)):
                logits: torch.Tensor = model(
                    input_ids=ids[None].long(), position_ids=tables.positions[None].long(), use_cache=False
                ).logits[0]
            return logits

        return run

"""Steps whose numbers all lie in one buffer, always at the same places: what a graph can be captured of.

Owns the shapes that steps are padded to, where each number of a step lies, and the forward pass that reads
them there. Padding belongs to nobody: its K and V go to a block that the ledger does not know, and no logits
are read from it. Must not know when graphs are made, nor requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from seallmd.worker.attention import answered_by
from seallmd.worker.kv import KvView, Page, Span
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.requests import Packed
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import Tables, Tiles, decode_tables
from seallmd.worker.transfer import to_device

MOST_ROWS = 256
MOST_TOKENS = 128  # of a mixed step: with more, the device computes for longer than launching takes
_MOST_SPANS = (8, 32, MOST_TOKENS)


class DecodeShape(NamedTuple):
    """Steps of single tokens. rows: requests. pages: of the widest block table."""

    rows: int
    pages: int

    def numbers(self, page_blocks: int) -> int:
        """How many describe a step."""
        return self.rows * (2 + self.pages * page_blocks)


class MixedShape(NamedTuple):
    """Steps with prompt chunks, single tokens beside them or not. tokens, spans: at most."""

    tokens: int
    spans: int
    pages: int

    def numbers(self, page_blocks: int) -> int:
        """How many describe a step."""
        return sum(self.sections(page_blocks))

    def sections(self, page_blocks: int) -> tuple[int, ...]:
        """Of each kind, in their order; spans have one more, to which the padding belongs."""
        spans = self.spans + 1
        of_tokens = (self.tokens,) * 3
        return (*of_tokens, spans, spans + 1, spans, self.spans, self.spans, spans * self.pages * page_blocks)


Shape = DecodeShape | MixedShape


def shape_for(spans: Sequence[Span], page: Page, growth: int, chunks: bool) -> Shape | None:
    """The smallest shape that holds a step, None for one that is too large.

    growth: from one width of block tables to the next. chunks: whether a step may have any.
    """
    tokens = sum(span.tokens for span in spans)
    width = width_for(max(page.holding(span.context) for span in spans), growth)
    if tokens == len(spans):
        return decode_shape(tokens, width)
    if not chunks or tokens > MOST_TOKENS:
        return None
    most = next(most for most in _MOST_SPANS if most >= len(spans))
    return MixedShape(max(16, 1 << (tokens - 1).bit_length()), most, width)


def decode_shape(rows: int, width: int) -> DecodeShape | None:
    """For so many rows; None for too many. width: of their tables, one that `width_for` gives."""
    if rows > MOST_ROWS:
        return None
    return DecodeShape(1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8, width)


def width_for(pages: int, growth: int) -> int:
    """Pages of the block tables of a shape, where so many are needed. growth: as in `shape_for`."""
    width = 4
    while width < pages:
        width *= growth
    return width


class Site(NamedTuple):
    """What all steps of a model have in common.

    numbers: int32, the buffer. scratch: a block that nobody owns. kernels: None for plain torch.
    """

    numbers: torch.Tensor
    model: PreTrainedModel
    kv: KvView
    kernels: Kernels | None
    scratch: int


class StaticStep(ABC):
    """A step of one shape. ids: where those of its tokens are."""

    ids: torch.Tensor

    def __init__(self, site: Site) -> None:
        self._site = site

    @abstractmethod
    def fill(self, packed: Packed) -> None:
        """Put a step into the buffer, in one copy; an empty one is all padding."""

    @abstractmethod
    def run(self) -> torch.Tensor:
        """The forward pass: logits of every row, or of the sampling ones. It makes all that it needs anew."""

    def _host(self, numbers: int) -> torch.Tensor:
        """Where to write them; a new one each time, as the last may still be on its way to the device."""
        pinned = self._site.numbers.device.type == "cuda"
        return torch.empty(numbers, dtype=torch.int32, pin_memory=pinned)

    def _send(self, host: torch.Tensor) -> None:
        self._site.numbers[: len(host)].copy_(host, non_blocking=True)

    def _fill_tables(self, table: np.ndarray[Any, Any], spans: Sequence[Span]) -> None:
        """Block tables [spans at most, width]; rows behind the last are padding's."""
        page = self._site.kv.page
        table[len(spans) :] = self._site.scratch
        for row, span in enumerate(spans):
            used = page.holding(span.context) * page.blocks
            table[row, :used] = span.table[:used]
            table[row, used:] = span.table[0]  # plain attention reads it under a mask, so it must be finite

    def _forward(self, tables: Tables, **more: Any) -> torch.Tensor:
        site = self._site
        with answered_by(TableBatch(site.kv, tables, site.kernels)):
            logits: torch.Tensor = site.model(
                input_ids=self.ids[None].long(),
                position_ids=tables.positions[None].long(),
                use_cache=False,
                **more,
            ).logits[0]
        return logits


class DecodeStep(StaticStep):
    """Single tokens. In the buffer: ids, contexts, block tables."""

    def __init__(self, site: Site, shape: DecodeShape) -> None:
        super().__init__(site)
        self._shape = shape
        rows, width = shape.rows, shape.pages * site.kv.page.blocks
        numbers = site.numbers[: shape.numbers(site.kv.page.blocks)]
        self.ids, self._contexts, table = numbers.split((rows, rows, rows * width))
        longest = shape.pages * site.kv.page.tokens
        self._tables = decode_tables(table.view(rows, width), self._contexts, longest)

    def fill(self, packed: Packed) -> None:
        """As `StaticStep.fill`."""
        rows, real = self._shape.rows, len(packed.spans)
        host = self._host(self._shape.numbers(self._site.kv.page.blocks))
        numbers = host.numpy()
        ids, contexts, table = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
        ids[:real], ids[real:] = packed.ids, 0
        contexts[:real], contexts[real:] = [span.context for span in packed.spans], 1
        self._fill_tables(table.reshape(rows, -1), packed.spans)
        self._send(host)

    def run(self) -> torch.Tensor:
        """As `StaticStep.run`: of every row."""
        return self._forward(self._tables.at(self._contexts - 1))


class MixedStep(StaticStep):
    """Prompt chunks and single tokens, on kernels.

    In the buffer: of each token its id, position and span; of each span its context, first token (and where
    the last one ends) and number of tokens; the rows that draw; spans of one token; block tables.
    """

    def __init__(self, site: Site, shape: MixedShape) -> None:
        super().__init__(site)
        self._shape = shape
        self._sizes = shape.sections(site.kv.page.blocks)
        self.ids, *self._parts = site.numbers[: sum(self._sizes)].split(self._sizes)
        self._nothing = torch.zeros(shape.spans, dtype=torch.int32, device=site.numbers.device)
        self._longest = shape.pages * site.kv.page.tokens
        self._cuts: dict[int, torch.Tensor] = {}  # by size of tile: spans and starts of every tile
        self._spans: Sequence[Span] = ()

    def fill(self, packed: Packed) -> None:
        """As `StaticStep.fill`."""
        spans, real, none = packed.spans, len(packed.ids), self._shape.spans
        self._spans = spans
        host = self._host(sum(self._sizes))
        parts = [part.numpy() for part in host.split(self._sizes)]
        ids, positions, span_of, contexts, starts, counts, last, singles, table = parts
        ids[:real], ids[real:] = packed.ids, 0
        positions[:real], positions[real:] = packed.positions, 0
        span_of[real:] = none
        for number, span in enumerate(spans):
            span_of[span.first : span.first + span.tokens] = number
        contexts[: len(spans)], contexts[len(spans) :] = [span.context for span in spans], 0
        starts[: len(spans)], starts[len(spans) :] = [span.first for span in spans], real
        counts[: len(spans)], counts[len(spans) :] = [span.tokens for span in spans], 0
        last[: len(packed.last)], last[len(packed.last) :] = packed.last, 0
        single = [number for number, span in enumerate(spans) if span.tokens == 1]
        singles[: len(single)], singles[len(single) :] = single, none
        self._fill_tables(table.reshape(none + 1, -1), spans)
        self._send(host)
        for size in self._cuts:
            self._cut(size)

    def run(self) -> torch.Tensor:
        """As `StaticStep.run`: of the sampling rows."""
        positions, span_of, contexts, starts, counts, last, singles, table = self._parts
        blocks = table.view(self._shape.spans + 1, -1)
        tables = _PaddedTables(self._tiles_of, blocks, contexts, starts, counts, span_of, positions)
        tables.most = self._shape.tokens
        tables.use(Tiles(singles, self._nothing, 1, self._longest))
        logits = self._forward(tables, logits_to_keep=last.long())
        return logits if len(logits) == len(last) else logits[last.long()]  # a family that computes all

    def _tiles_of(self, size: int) -> Tiles:
        """The chunks of this step in tiles of such a size, with room for those of any other."""
        if size not in self._cuts:
            shape = self._shape
            room = shape.tokens // size + min(shape.spans, shape.tokens // 2)
            self._cuts[size] = torch.empty(2, room, dtype=torch.int32, device=self.ids.device)
            self._cut(size)
        spans, starts = self._cuts[size]
        return Tiles(spans, starts, size, self._longest)

    def _cut(self, size: int) -> None:
        """Put this step's tiles where the kernels look for them; the others belong to padding."""
        room, tiles = self._cuts[size], [(self._shape.spans, 0)] * self._cuts[size].shape[1]
        chunks = ((number, span) for number, span in enumerate(self._spans) if span.tokens > 1)
        cut = [(number, at) for number, span in chunks for at in range(0, span.tokens, size)]
        tiles[: len(cut)] = cut
        room.copy_(to_device(list(zip(*tiles, strict=True)), room.device, torch.int32))


class _PaddedTables(Tables):
    """Tables whose spans only the buffer knows. tiles: those of a size. numbers: as `Tables` takes them."""

    def __init__(self, tiles: Callable[[int], Tiles], *numbers: torch.Tensor) -> None:
        super().__init__(*numbers, spans=())  # type: ignore[misc]  # as many as `Tables` takes
        self._room = tiles

    def finite(self, out: torch.Tensor) -> torch.Tensor:
        """As `Tables.finite`: padding got what lay in memory, and NaN would go through all of the model."""
        asked = self.span_of < len(self.contexts) - 1
        return torch.where(asked[:, None, None], out, 0)

    def _cut(self, size: int) -> Tiles | None:
        return self._tiles.get(size) or self._room(size)


def static_step(site: Site, shape: Shape) -> StaticStep:
    """The step of a shape."""
    return DecodeStep(site, shape) if isinstance(shape, DecodeShape) else MixedStep(site, shape)

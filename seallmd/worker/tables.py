"""Where the packed tokens of one step belong, as tensors on the device: what kernels over block tables read.

Owns their layout, and the cutting of queries into tiles. Everything but shapes is data, so that one captured
graph serves every step of a shape. Must not know kernels, requests or where blocks come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seallmd.worker.kv import Page, Span
from seallmd.worker.transfer import to_device


class Tiles(NamedTuple):
    """Queries that one program answers: up to `size` neighbouring tokens of a span.

    spans, starts: int32 [tiles], whose tokens, and the first of them counted from the span's own first.
    longest: no context of theirs has more tokens.
    """

    spans: torch.Tensor
    starts: torch.Tensor
    size: int
    longest: int


class Tables:
    """A step's block tables and spans, int32 on one device.

    blocks [spans, width]: a block table each, page after page, its end padded with any block that exists.
    contexts [spans]: tokens up to the span's last. starts [spans + 1]: where its packed rows begin, and those
    of the next. counts [spans]: of its packed rows; most: of any span's. span_of, positions [tokens]: of each
    packed row.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        contexts: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        span_of: torch.Tensor,
        positions: torch.Tensor,
        spans: Sequence[Span],
    ) -> None:
        self.blocks, self.contexts, self.starts, self.counts = blocks, contexts, starts, counts
        self.firsts = starts[:-1]
        self.span_of, self.positions = span_of, positions
        self.most = max((span.tokens for span in spans), default=1)
        self._spans = spans
        self._of_layers: torch.Tensor | None = None
        self._tiles: dict[int, Tiles | None] = {}

    def use(self, tiles: Tiles) -> None:
        """Take these instead of cutting the spans: for a step whose spans are known to the device alone."""
        self._tiles[tiles.size] = tiles

    def finite(self, out: torch.Tensor) -> torch.Tensor:
        """Attention's answer [tokens, heads, dim], with finite numbers in rows that nobody asked for."""
        return out

    def of_layer(self, page: Page, block: int) -> torch.Tensor:
        """The block tables of a layer [spans, pages] whose KV lies in block number `block` of a page."""
        if page.blocks == 1:
            return self.blocks
        if self._of_layers is None:  # all layers', once a step
            self._of_layers = self.blocks.unflatten(1, (-1, page.blocks)).permute(2, 0, 1).contiguous()
        return self._of_layers[block]

    def singles(self) -> Tiles | None:
        """Spans of one token, a tile each."""
        return self._cut(1)

    def chunks(self, size: int) -> Tiles | None:
        """Longer spans in tiles of up to `size` tokens, at least 2."""
        return self._cut(size)

    def _cut(self, size: int) -> Tiles | None:
        if size not in self._tiles:
            chosen = [(n, s) for n, s in enumerate(self._spans) if (s.tokens == 1) == (size == 1)]
            cut = [(n, start) for n, span in chosen for start in range(0, span.tokens, size)]
            longest = max((span.context for _, span in chosen), default=0)
            self._tiles[size] = self._on_device(cut, size, longest) if cut else None
        return self._tiles[size]

    def _on_device(self, cut: list[tuple[int, int]], size: int, longest: int) -> Tiles:
        pairs = to_device(list(zip(*cut, strict=True)), self.blocks.device, torch.int32)
        return Tiles(pairs[0], pairs[1], size, longest)


def tables_of(spans: Sequence[Span], page: Page, device: torch.device) -> Tables:
    """The tables of a step. One copy to the device."""
    width = max(page.holding(span.context) * page.blocks for span in spans)
    blocks: list[int] = []
    for span in spans:
        own = span.table[:width]
        blocks += own
        blocks += [0] * (width - len(own))
    numbers = [span.context for span in spans]
    tokens = sum(span.tokens for span in spans)
    numbers += [*(span.first for span in spans), tokens]
    numbers += [span.tokens for span in spans]
    for number, span in enumerate(spans):
        numbers += [number] * span.tokens
    for span in spans:
        numbers += range(span.context - span.tokens, span.context)
    packed = to_device(blocks + numbers, device, torch.int32)
    sizes = (len(blocks), len(spans), len(spans) + 1, len(spans), tokens, tokens)
    table, contexts, starts, counts, span_of, positions = packed.split(sizes)
    return Tables(table.view(-1, width), contexts, starts, counts, span_of, positions, spans)


class DecodeTables(NamedTuple):
    """What stays the same in all steps of one shape whose spans have one token each."""

    blocks: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor  # 0, 1, 2, ..., and where the last row ends
    ones: torch.Tensor
    tiles: Tiles

    def at(self, positions: torch.Tensor) -> Tables:
        """The tables of a step. positions: of each row's token, contexts - 1."""
        rows = self.starts[:-1]
        tables = Tables(self.blocks, self.contexts, self.starts, self.ones, rows, positions, ())
        tables.use(self.tiles)
        return tables


def decode_tables(blocks: torch.Tensor, contexts: torch.Tensor, longest: int) -> DecodeTables:
    """For steps that leave their tables in `blocks` and `contexts`, none of more than `longest` tokens."""
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device=contexts.device)
    rows = starts[:-1]
    tiles = Tiles(rows, torch.zeros_like(rows), 1, longest)
    return DecodeTables(blocks, contexts, starts, torch.ones_like(rows), tiles)

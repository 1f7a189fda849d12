"""How one service reads the arena as KV cache.

Owns the two layouts of KV in blocks, for each layer K then V, each [token, head, dim]:

- merged: a block holds all layers of its tokens;
- split: a block holds one layer of its tokens. The largest layer says how many these are, since all layers
  of a token share a place in the table.

Everybody else knows pages: a block table is a list of pages, a page the `blocks` blocks that hold the KV of
`tokens` tokens, one in the merged layout, one per layer in the split one. Must not know requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seallmd.core.shapes import LayerShape
from seallmd.worker.transfer import to_device


class Page(NamedTuple):
    """The unit of a block table: KV of `tokens` tokens in all layers lies in `blocks` blocks."""

    tokens: int
    blocks: int

    def holding(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.tokens)


class Span(NamedTuple):
    """A request's part of a packed step. first: its first packed row. context: tokens up to its last.

    table: its blocks, page after page.
    """

    first: int
    tokens: int
    context: int
    table: Sequence[int]


def page_of(layers: Sequence[LayerShape], itemsize: int, block_bytes: int, layout: str) -> Page:
    """The page of a service. layout: "merged" or "split". Raises ValueError if a block is too small."""
    sizes = [itemsize * s.kv_heads * (s.k_dim + s.v_dim) for s in layers]  # bytes of one token
    token_bytes, blocks = (max(sizes), len(sizes)) if layout == "split" else (sum(sizes), 1)
    if block_bytes < token_bytes:
        raise ValueError(
            f"a block of {block_bytes} bytes is smaller than one token's KV ({token_bytes} bytes)"
        )
    return Page(block_bytes // token_bytes, blocks)


class KvView:
    """Strided views of one arena; layers may differ in heads and head sizes.

    arena: the device's bytes [blocks * block_bytes]. Raises ValueError if a block cannot hold one token.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        block_bytes: int,
        layers: Sequence[LayerShape],
        dtype: torch.dtype,
        layout: str = "merged",
    ) -> None:
        self.dtype, self.shapes = dtype, tuple(layers)
        self.page = page_of(layers, dtype.itemsize, block_bytes, layout)
        elements, step = arena.view(dtype), block_bytes // dtype.itemsize
        self._blocks = elements.view(-1, step)
        self._keys: list[torch.Tensor] = []  # per layer [block, token, head, dim]
        self._values: list[torch.Tensor] = []
        at = 0
        for shape in layers:
            for dim, views in ((shape.k_dim, self._keys), (shape.v_dim, self._values)):
                size = (self._blocks.shape[0], self.page.tokens, shape.kv_heads, dim)
                views.append(elements.as_strided(size, (step, shape.kv_heads * dim, dim, 1), at))
                at += self.page.tokens * shape.kv_heads * dim
            if layout == "split":
                at = 0

    @property
    def layers(self) -> int:
        """How many attention layers it holds."""
        return len(self._keys)

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer where they lie, [block, token, head, dim] each."""
        return self._keys[layer], self._values[layer]

    def block_of_page(self, layer: int) -> int:
        """Which of a page's blocks holds this layer."""
        return layer if self.page.blocks > 1 else 0

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks. Attention reads the unwritten end of a block under a mask, and a NaN left there
        by a former owner would pass through it (0 * NaN)."""
        if blocks:
            self._blocks.index_fill_(0, to_device(blocks, self._blocks.device), 0)

    def write(
        self, layer: int, pages: torch.Tensor, offset: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store K and V [tokens, heads, dim] in pages [tokens, page.blocks] at token `offset` [tokens]."""
        block = pages[:, self.block_of_page(layer)]
        self._keys[layer][block, offset] = key
        self._values[layer][block, offset] = value

    def read(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of pages [n, page.blocks] in order, [n * page.tokens, heads, dim] each."""
        blocks = pages[:, self.block_of_page(layer)]
        keys = torch.index_select(self._keys[layer], 0, blocks)
        values = torch.index_select(self._values[layer], 0, blocks)
        return keys.flatten(0, 1), values.flatten(0, 1)

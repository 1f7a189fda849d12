"""How one service reads the arena as KV cache.

Owns the layout inside a block: merged, that is, a block holds all layers of its tokens, for each layer K
then V, each [token, head, dim]. Attention sees `write` and `read` alone, so another layout (one block per
layer) can be compared by replacing this module. Must not know requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seallmd.core.messages import LayerShape


class KvView:
    """Strided views of one arena; layers may differ in heads and head sizes.

    arena: the device's bytes [blocks * block_bytes]. Raises ValueError if a block cannot hold one token.
    """

    def __init__(
        self, arena: torch.Tensor, block_bytes: int, layers: Sequence[LayerShape], dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        token_bytes = dtype.itemsize * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in layers)
        self.tokens_per_block = block_bytes // token_bytes
        if self.tokens_per_block == 0:
            raise ValueError(
                f"a block of {block_bytes} bytes is smaller than one token's KV ({token_bytes} bytes)"
            )
        elements, step = arena.view(dtype), block_bytes // dtype.itemsize
        self._blocks = elements.view(-1, step)
        self._keys: list[torch.Tensor] = []  # per layer [block, token, head, dim]
        self._values: list[torch.Tensor] = []
        at = 0
        for shape in layers:
            for dim, views in ((shape.k_dim, self._keys), (shape.v_dim, self._values)):
                size = (self._blocks.shape[0], self.tokens_per_block, shape.kv_heads, dim)
                views.append(elements.as_strided(size, (step, shape.kv_heads * dim, dim, 1), at))
                at += self.tokens_per_block * shape.kv_heads * dim

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer where they lie, [block, token, head, dim] each."""
        return self._keys[layer], self._values[layer]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks. Attention reads the unwritten end of a block under a mask, and a NaN left there
        by a former owner would pass through it (0 * NaN)."""
        if blocks:
            self._blocks.index_fill_(0, torch.tensor(blocks, device=self._blocks.device), 0)

    def write(
        self, layer: int, block: torch.Tensor, offset: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store K and V [tokens, heads, dim] at (block, offset) [tokens] each."""
        self._keys[layer][block, offset] = key
        self._values[layer][block, offset] = value

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V of these blocks in order, [blocks * tokens_per_block, heads, dim] each."""
        keys = torch.index_select(self._keys[layer], 0, blocks)
        values = torch.index_select(self._values[layer], 0, blocks)
        return keys.flatten(0, 1), values.flatten(0, 1)

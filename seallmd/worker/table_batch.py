"""Attention of a step that is described by tensors alone (see `tables`): a graph can be captured of it.

Owns who does it: the Triton kernels where they are at hand, for any step; plain torch for steps of single
tokens, gathering each row's whole table. Must not know requests, sampling or graphs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.reference import Norm
from seallmd.worker.paged import plain_attention
from seallmd.worker.tables import Tables


class TableBatch:
    """Answers the attention calls of one step (see `attention.Answerer`).

    kernels: None to do it in torch: then every span has one token, and whatever a table names holds finite
    numbers, its padding too.
    """

    def __init__(self, kv: KvView, tables: Tables, kernels: Kernels | None) -> None:
        self._kv, self._tables, self._kernels = kv, tables, kernels
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def rotates(self) -> bool:
        """Whether `attend_rotated` may be called."""
        return self._kernels is not None and self._kernels.rotate is not None

    def attend_rotated(
        self, call: Call, cos: torch.Tensor, sin: torch.Tensor, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        """As `attend`, of query and key that are still to be normed, where there are norms, and rotated."""
        if self._kernels is None:
            raise RuntimeError("only kernels rotate")
        return self._kernels.attend_rotated(self._kv, self._tables, call, cos, sin, q_norm, k_norm)

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        if self._kernels is not None:
            return self._kernels.attend(self._kv, self._tables, call)
        key, value = call.key[0].transpose(0, 1), call.value[0].transpose(0, 1)
        self._kv.write(call.layer, *self._slots, key, value)
        key, value = self._kv.read(call.layer, self._pages.flatten(0, 1))
        rows = self._pages.shape[0]
        key = key.unflatten(0, (rows, -1)).transpose(1, 2)  # [rows, KV heads, keys, dim]
        value = value.unflatten(0, (rows, -1)).transpose(1, 2)
        folded = call.query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        mask = self._mask(call.window)
        if call.softcap is None and call.sinks is None:
            out = scaled_dot_product_attention(folded, key, value, mask, scale=call.scale)
        else:
            out = plain_attention(call, folded, key, value, mask, tokens=1)
        return out.flatten(1, 2)

    @cached_property
    def _pages(self) -> torch.Tensor:
        """[rows, pages, blocks per page]."""
        return self._tables.blocks.unflatten(1, (-1, self._kv.page.blocks))

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row's K and V go, as for `KvView.write`."""
        positions, size = self._tables.positions, self._kv.page.tokens
        rows = torch.arange(positions.shape[0], device=positions.device)
        return self._pages[rows, positions // size], positions % size

    def _mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            contexts = self._tables.contexts[:, None]
            keys = torch.arange(self._pages.shape[1] * self._kv.page.tokens, device=contexts.device)
            seen = keys < contexts
            if window is not None:
                seen &= keys >= contexts - window
            hidden = torch.full(seen.shape, float("-inf"), dtype=self._kv.dtype, device=contexts.device)
            self._masks[window] = hidden.masked_fill_(seen, 0)[:, None, None]
        return self._masks[window]

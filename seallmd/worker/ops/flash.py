"""FlashAttention 3 (Shah et al. 2024) behind the seam of attention, where it is installed.

Owns its interface (`flash_attn_interface`, which comes compiled for one torch, for Hopper GPUs) and what it
can be asked: 16-bit K and V of one head size, read where they lie through the block tables. Whether it is
right and quicker is for `trials` to find out; K and V are stored by others. Must not know models or requests.

Nothing but shapes is read on the host, so that a graph can be captured of it. It is unmeasured.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.tables import Tables

NAME = "FlashAttention 3"
_MODULE = "flash_attn_interface"
_WIDEST = 256  # numbers of a head
_ALIGNED = 16  # bytes that are read at once


@dataclass(frozen=True)
class Flash:
    """decodes, chunks: whether it answers steps of single tokens, and steps with longer spans."""

    function: Callable[..., Any]
    decodes: bool = True
    chunks: bool = True

    def names(self) -> str:
        """What it is in use for, for people."""
        uses = [name for name, used in (("single tokens", self.decodes), ("prompts", self.chunks)) if used]
        return f"{NAME} for {' and '.join(uses)}"

    def takes(self, kv: KvView, tables: Tables, call: Call) -> bool:
        """Whether to ask it, by what the host knows."""
        wanted = self.decodes if tables.most == 1 else self.chunks
        return wanted and self.can(kv, call)

    def can(self, kv: KvView, call: Call) -> bool:
        """Whether it computes such attention over such K and V."""
        views = kv.views(call.layer)
        k_dim, v_dim = (view.shape[3] for view in views)
        strides = [stride * kv.dtype.itemsize for view in views for stride in view.stride()[:3]]
        return (
            kv.dtype.itemsize == 2
            and call.query.dtype is kv.dtype
            and call.sinks is None
            and k_dim == v_dim <= _WIDEST
            and k_dim % 8 == 0
            and all(number % _ALIGNED == 0 for number in (*strides, *(view.data_ptr() for view in views)))
        )

    def attend(self, kv: KvView, tables: Tables, call: Call) -> torch.Tensor:
        """As `triton_attention.attend`."""
        keys, values = kv.views(call.layer)
        rows = call.query[0].transpose(0, 1)
        out: torch.Tensor = self.function(
            q=rows if rows.stride(2) == 1 else rows.contiguous(),
            k_cache=keys,
            v_cache=values,
            cache_seqlens=tables.contexts,
            page_table=tables.of_layer(kv.page, kv.block_of_page(call.layer)),
            cu_seqlens_q=tables.starts,
            max_seqlen_q=tables.most,
            softmax_scale=call.scale,
            causal=True,
            window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
            softcap=call.softcap or 0.0,
        )
        return out


def find() -> Flash | None:
    """The library, None where it is not installed. Raises whatever its import raises."""
    if importlib.util.find_spec(_MODULE) is None:
        return None
    return Flash(importlib.import_module(_MODULE).flash_attn_with_kvcache)

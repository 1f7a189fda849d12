"""Attention over block tables in Triton: K and V are read where they lie in the arena, and copied nowhere.

Owns the kernels, their tile sizes and when the keys of a query are split over several programs. One kernel
answers prompt chunks and single tokens alike: a program takes a tile of neighbouring queries of one KV head,
all query heads that share it folded into its rows, and walks over the keys that they see (FlashAttention,
Dao et al. 2022); where there are few programs, each walks over a part, and the parts are combined
(FlashDecoding, Dao et al. 2023). Sums are in float32. Offsets of blocks are 64 bits: an arena is larger than
2 GiB. Keys that were not written are never read.

Must not know models or requests. Imports triton: only to be imported where that is there. Its results are
tested with Triton's interpreter on a CPU; on a GPU it is unmeasured.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops.triton_store import rows_of
from seallmd.worker.tables import Tables, Tiles

_LEAST_DOT = 16  # rows and columns of the smallest matrix product
_MOST_SPLITS = 64
_SPLIT_TOKENS = 256  # a part of the keys is not worth less than this
_WAVES = 2  # programs wanted per multiprocessor

# What differs from step to step is not specialised, neither numbers nor where a tensor of indices begins: a
# variant more is seconds of compiling, amid a step.
_INDICES = ["blocks", "contexts", "firsts", "counts", "tile_spans", "tile_starts"]
_SUMS = ["part_max", "part_sum"]


@triton.jit(do_not_specialize=["table_stride", "splits"], do_not_specialize_on_alignment=_INDICES + _SUMS)
def _attend(
    query,
    keys,
    values,
    sinks,
    out,
    parts,
    part_max,
    part_sum,
    blocks,
    contexts,
    firsts,
    counts,
    tile_spans,
    tile_starts,
    scale,
    softcap,
    window,
    splits,
    query_token,
    query_head,
    keys_block,
    keys_token,
    values_block,
    values_token,
    table_stride,
    page_tokens,
    page_blocks,
    block_of_page,
    heads,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile, KV head and part of the keys. Row r is token r // GROUP of the tile and head r % GROUP."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span = tl.load(tile_spans + tile).to(tl.int64)
    start = tl.load(tile_starts + tile)
    context, count = tl.load(contexts + span), tl.load(counts + span)
    first = tl.load(firsts + span).to(tl.int64)

    rows = tl.arange(0, ROWS)
    token = start + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    real = (token < count) & (rows < TILE * GROUP)
    position = context - count + token

    k, v = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    at = query + (first + token)[:, None] * query_token + head[:, None] * query_head + k[None, :]
    q = tl.load(at, mask=real[:, None] & (k < K_DIM)[None, :], other=0.0)

    low = 0
    if HAS_WINDOW:
        low = tl.maximum(context - count + start - window + 1, 0)
    high = context - count + tl.minimum(start + TILE, count)
    part = tl.cdiv(tl.cdiv(high - low, KEYS), splits) * KEYS
    begin = low + split * part
    end = tl.minimum(begin + part, high)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_PAD], tl.float32)
    for at_key in range(begin, end, KEYS):
        n = at_key + tl.arange(0, KEYS)
        here = n < end
        entry = (n // page_tokens) * page_blocks + block_of_page
        block = tl.load(blocks + span * table_stride + entry, mask=here, other=0).to(tl.int64)
        offset = n % page_tokens
        from_key = keys + (block * keys_block + offset * keys_token + kv_head * K_DIM)[:, None] + k[None, :]
        key = tl.load(from_key, mask=here[:, None] & (k < K_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * (scores / softcap)) - 1)  # tanh
        seen = here[None, :] & (n[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that saw nothing yet
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(largest - safe)
        total = total * shrink + tl.sum(weights, 1)
        from_value = values + (block * values_block + offset * values_token + kv_head * V_DIM)[:, None]
        value = tl.load(from_value + v[None, :], mask=here[:, None] & (v < V_DIM)[None, :], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        largest = new

    fits = real[:, None] & (v < V_DIM)[None, :]
    if SPLIT:
        slot = ((tile * TILE + rows // GROUP) * heads + head) * splits + split
        tl.store(part_max + slot, largest, mask=real)
        tl.store(part_sum + slot, total, mask=real)
        tl.store(parts + slot[:, None] * V_DIM + v[None, :], sums, mask=fits)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
            new = tl.maximum(largest, sink)
            shrink = tl.exp(largest - new)
            total = total * shrink + tl.exp(sink - new)
            sums = sums * shrink[:, None]
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        row = (first + token) * heads + head
        tl.store(out + row[:, None] * V_DIM + v[None, :], result.to(out.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=_INDICES[2:] + _SUMS)
def _combine(
    sinks,
    out,
    parts,
    part_max,
    part_sum,
    firsts,
    counts,
    tile_spans,
    tile_starts,
    splits,
    heads,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One token and query head: its parts, weighted by their sums."""
    tile, head = tl.program_id(0) // TILE, tl.program_id(1)
    span = tl.load(tile_spans + tile).to(tl.int64)
    token = tl.load(tile_starts + tile) + tl.program_id(0) % TILE
    if token < tl.load(counts + span):
        row = (tl.load(firsts + span).to(tl.int64) + token) * heads + head
        s, v = tl.arange(0, SPLITS_PAD), tl.arange(0, V_PAD)
        there, slot = s < splits, (tl.program_id(0) * heads + head) * splits + s
        largest = tl.load(part_max + slot, mask=there, other=float("-inf"))
        total = tl.load(part_sum + slot, mask=there, other=0.0)
        mask = there[:, None] & (v < V_DIM)[None, :]
        sums = tl.load(parts + slot[:, None] * V_DIM + v[None, :], mask=mask, other=0.0)
        top = tl.max(largest, 0)
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32)
            top = tl.maximum(top, sink)
        weights = tl.exp(largest - top)  # 0 for a part without keys
        whole = tl.sum(total * weights, 0)
        if HAS_SINKS:
            whole += tl.exp(sink - top)
        result = tl.sum(sums * weights[:, None], 0) / whole
        tl.store(out + row * V_DIM + v, result.to(out.dtype.element_ty), mask=v < V_DIM)


def attend(kv: KvView, tables: Tables, call: Call, processors: int) -> torch.Tensor:
    """Attention of a layer over what is stored, the step's own K and V too: [tokens, query heads, value dim].

    processors: multiprocessors of the device.
    """
    query = rows_of(call.query)
    out = query.new_empty(query.shape[0], query.shape[1], call.value.shape[-1])
    group = query.shape[1] // call.key.shape[1]
    singles = tables.singles()
    if singles is not None:
        _launch(kv, tables, call, query, out, singles, processors)
    chunks = tables.chunks(max(2, _chunk_rows(call) // group))
    if chunks is not None:
        _launch(kv, tables, call, query, out, chunks, processors)
    return out


def splits_of(programs: int, longest: int, window: int | None, processors: int) -> int:
    """Into how many parts to split the keys, where so many programs would run otherwise; a power of two."""
    seen = longest if window is None else min(longest, window)
    wanted = min(_WAVES * processors // max(programs, 1), -(-seen // _SPLIT_TOKENS), _MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


class Sizes(NamedTuple):
    """keys: how many are read at once. warps: of a program."""

    keys: int
    warps: int


def sizes_of(rows: int, dim: int, exact: bool) -> Sizes:
    """What fits into fast memory beside a tile of so many rows. dim: of the larger of K and V."""
    return Sizes(32 if exact or dim > 128 else 64, 8 if rows >= 128 else 4)


def _chunk_rows(call: Call) -> int:
    """Rows of a tile of a prompt chunk: what fits beside K and V in the fast memory."""
    wide = max(call.key.shape[-1], call.value.shape[-1]) > 128
    return 32 if call.query.dtype is torch.float32 or wide else 128


def _launch(
    kv: KvView,
    tables: Tables,
    call: Call,
    query: torch.Tensor,
    out: torch.Tensor,
    tiles: Tiles,
    processors: int,
) -> None:
    keys, values = kv.views(call.layer)
    (_, heads, k_dim), kv_heads, v_dim = query.shape, keys.shape[2], values.shape[3]
    group, count = heads // kv_heads, tiles.spans.shape[0]
    splits = splits_of(count * kv_heads, tiles.longest, call.window, processors)
    parts, stats = out, out
    if splits > 1:
        # By tile, not by row of the step: a long context beside many rows of a prompt has many parts. Where
        # keys are split programs are few, so 32 bits hold every place.
        rows_of_tiles = count * tiles.size
        parts = torch.empty(rows_of_tiles, heads, splits, v_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(2, rows_of_tiles, heads, splits, dtype=torch.float32, device=out.device)
    sinks = out if call.sinks is None else call.sinks
    k_pad, v_pad = (max(_LEAST_DOT, triton.next_power_of_2(dim)) for dim in (k_dim, v_dim))
    rows = max(_LEAST_DOT, triton.next_power_of_2(tiles.size * group))
    exact = query.dtype is torch.float32
    sizes = sizes_of(rows, max(k_pad, v_pad), exact)
    spread = (tables.firsts, tables.counts, tiles.spans, tiles.starts)
    _attend[(count, kv_heads, splits)](
        query,
        keys,
        values,
        sinks,
        out,
        parts,
        stats[0],
        stats[-1],
        tables.blocks,
        tables.contexts,
        *spread,
        call.scale,
        call.softcap or 0.0,
        call.window or 0,
        splits,
        *query.stride()[:2],
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        tables.blocks.stride(0),
        *kv.page,
        kv.block_of_page(call.layer),
        heads,
        GROUP=group,
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_PAD=k_pad,
        V_PAD=v_pad,
        TILE=tiles.size,
        ROWS=rows,
        KEYS=sizes.keys,
        HAS_SOFTCAP=call.softcap is not None,
        HAS_SINKS=call.sinks is not None,
        HAS_WINDOW=call.window is not None,
        SPLIT=splits > 1,
        PRECISION="ieee" if exact else "tf32",
        num_warps=sizes.warps,
        num_stages=2,
    )
    if splits > 1:
        _combine[(count * tiles.size, heads)](
            sinks,
            out,
            parts,
            stats[0],
            stats[-1],
            *spread,
            splits,
            heads,
            V_DIM=v_dim,
            V_PAD=triton.next_power_of_2(v_dim),
            TILE=tiles.size,
            SPLITS_PAD=triton.next_power_of_2(splits),
            HAS_SINKS=call.sinks is not None,
        )

"""A step's new K and V into the arena, in Triton: as they are, or rotated (and normed) on the way.

With rotation one launch does what takes plain torch two dozen: the norms of query and key heads where there
are some, the rotation of both, and storing. Arithmetic is float32, rounded where plain torch stores
something. Offsets of blocks are 64 bits: an arena is larger than 2 GiB.

Must not know models or requests. Imports triton: only to be imported where that is there. Tested with
Triton's interpreter on a CPU; on a GPU it is unmeasured.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops.reference import Norm
from seallmd.worker.tables import Tables

_HEADS = 8  # that one program rotates

# What differs from step to step is not specialised (see `triton_attention`).
_INDICES = ["blocks", "span_of", "positions"]


@triton.jit
def _place(blocks, span_of, positions, token, table_stride, page_tokens, page_blocks, block_of_page):
    """Block and offset of a packed token."""
    span, position = tl.load(span_of + token).to(tl.int64), tl.load(positions + token)
    entry = (position // page_tokens) * page_blocks + block_of_page
    block = tl.load(blocks + span * table_stride + entry).to(tl.int64)
    return block, position % page_tokens


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=_INDICES)
def _write(
    key,
    value,
    keys,
    values,
    blocks,
    span_of,
    positions,
    key_token,
    key_head,
    value_token,
    value_head,
    keys_block,
    keys_token,
    values_block,
    values_token,
    table_stride,
    page_tokens,
    page_blocks,
    block_of_page,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
):
    """One token and KV head: its K and V into the place that the table names."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, offset = _place(
        blocks, span_of, positions, token, table_stride, page_tokens, page_blocks, block_of_page
    )
    k, v = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    new_key = tl.load(key + token * key_token + head * key_head + k, mask=k < K_DIM)
    to_key = keys + block * keys_block + offset * keys_token + head * K_DIM + k
    tl.store(to_key, new_key.to(keys.dtype.element_ty), mask=k < K_DIM)
    new_value = tl.load(value + token * value_token + head * value_head + v, mask=v < V_DIM)
    to_value = values + block * values_block + offset * values_token + head * V_DIM + v
    tl.store(to_value, new_value.to(values.dtype.element_ty), mask=v < V_DIM)


@triton.jit
def _factors(weight, at, inside, offset):
    return (tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def _turn(
    source,
    target,
    real,
    weight,
    eps,
    offset,
    cos,
    sin,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Rotate heads, in halves of the first WIDTH numbers. source, target (pointers), real: [heads, 1]."""
    half = WIDTH // 2
    h, r = tl.arange(0, HALF_PAD), tl.arange(0, REST_PAD)
    turned, kept = h < half, r < DIM - WIDTH
    halves, rests = real & turned[None, :], real & kept[None, :]
    low = tl.load(source + h[None, :], mask=halves, other=0.0).to(tl.float32)
    high = tl.load(source + half + h[None, :], mask=halves, other=0.0).to(tl.float32)
    rest = tl.load(source + WIDTH + r[None, :], mask=rests, other=0.0).to(tl.float32)
    if HAS_NORM:
        stored = source.dtype.element_ty
        squares = tl.sum(low * low + high * high, 1) + tl.sum(rest * rest, 1)
        scale = (1 / tl.sqrt(squares / DIM + eps))[:, None]
        low = (low * scale * _factors(weight, h, turned, offset)).to(stored).to(tl.float32)
        high = (high * scale * _factors(weight, half + h, turned, offset)).to(stored).to(tl.float32)
        rest = rest * scale * _factors(weight, WIDTH + r, kept, offset)
    low_cos = tl.load(cos + h, mask=turned, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin + h, mask=turned, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos + half + h, mask=turned, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin + half + h, mask=turned, other=0.0).to(tl.float32)[None, :]
    new_low, new_high = low * low_cos - high * low_sin, high * high_cos + low * high_sin
    kind = target.dtype.element_ty
    tl.store(target + h[None, :], new_low.to(kind), mask=halves)
    tl.store(target + half + h[None, :], new_high.to(kind), mask=halves)
    tl.store(target + WIDTH + r[None, :], rest.to(kind), mask=rests)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=_INDICES)
def _rotate(
    query,
    key,
    value,
    keys,
    values,
    out,
    cos,
    sin,
    q_weight,
    k_weight,
    blocks,
    span_of,
    positions,
    q_eps,
    q_offset,
    k_eps,
    k_offset,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    cos_token,
    sin_token,
    keys_block,
    keys_token,
    values_block,
    values_token,
    table_stride,
    page_tokens,
    page_blocks,
    block_of_page,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    """One token and HEADS of its heads: first those of the query, then those of K and V."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_parts = (Q_HEADS + HEADS - 1) // HEADS
    cos_row, sin_row = cos + token * cos_token, sin + token * sin_token
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        source = query + token * query_token + head * query_head
        target = out + (token * Q_HEADS + head) * K_DIM
        _turn(
            source,
            target,
            head < Q_HEADS,
            q_weight,
            q_eps,
            q_offset,
            cos_row,
            sin_row,
            K_DIM,
            WIDTH,
            HALF_PAD,
            REST_PAD,
            HAS_Q_NORM,
        )
    else:
        head = (part - q_parts) * HEADS + tl.arange(0, HEADS)[:, None]
        real = head < KV_HEADS
        block, offset = _place(
            blocks, span_of, positions, token, table_stride, page_tokens, page_blocks, block_of_page
        )
        source = key + token * key_token + head * key_head
        target = keys + block * keys_block + offset * keys_token + head * K_DIM
        _turn(
            source,
            target,
            real,
            k_weight,
            k_eps,
            k_offset,
            cos_row,
            sin_row,
            K_DIM,
            WIDTH,
            HALF_PAD,
            REST_PAD,
            HAS_K_NORM,
        )
        v = tl.arange(0, V_PAD)[None, :]
        fits = real & (v < V_DIM)
        new_value = tl.load(value + token * value_token + head * value_head + v, mask=fits)
        to_value = values + block * values_block + offset * values_token + head * V_DIM + v
        tl.store(to_value, new_value.to(values.dtype.element_ty), mask=fits)


def write(kv: KvView, tables: Tables, call: Call) -> None:
    """Store the step's new K and V of a layer."""
    keys, values = kv.views(call.layer)
    key, value = rows_of(call.key), rows_of(call.value)
    k_dim, v_dim = key.shape[2], value.shape[2]
    _write[(key.shape[0], key.shape[1])](
        key,
        value,
        keys,
        values,
        tables.blocks,
        tables.span_of,
        tables.positions,
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        tables.blocks.stride(0),
        *kv.page,
        kv.block_of_page(call.layer),
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_PAD=triton.next_power_of_2(k_dim),
        V_PAD=triton.next_power_of_2(v_dim),
    )


def rotation_form(heads: int, k_dim: int, v_dim: int, width: int) -> dict[str, int]:
    """What of `_rotate` is compiled in, besides the counts of heads and which norms there are."""
    return {
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "V_PAD": triton.next_power_of_2(v_dim),
        "WIDTH": width,
        "HALF_PAD": triton.next_power_of_2(width // 2),
        "REST_PAD": triton.next_power_of_2(max(k_dim - width, 1)),
        "HEADS": min(_HEADS, triton.next_power_of_2(heads)),
        "num_warps": 2,
    }


def rotate(
    kv: KvView,
    tables: Tables,
    call: Call,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> torch.Tensor:
    """Rotate query and key as `reference.rotate_normed`, store K and V; the rotated query as in a `Call`.

    cos and sin [..., tokens, width].
    """
    keys, values = kv.views(call.layer)
    query, key, value = rows_of(call.query), rows_of(call.key), rows_of(call.value)
    (tokens, heads, k_dim), kv_heads, v_dim = query.shape, key.shape[1], value.shape[2]
    width = cos.shape[-1]
    cos, sin = cos.reshape(-1, width), sin.reshape(-1, width)
    out = torch.empty(tokens, heads, k_dim, dtype=query.dtype, device=query.device)
    form = rotation_form(heads, k_dim, v_dim, width)
    tile = form["HEADS"]
    _rotate[(tokens, triton.cdiv(heads, tile) + triton.cdiv(kv_heads, tile))](
        query,
        key,
        value,
        keys,
        values,
        out,
        cos,
        sin,
        cos if q_norm is None else q_norm.weight,
        cos if k_norm is None else k_norm.weight,
        tables.blocks,
        tables.span_of,
        tables.positions,
        *((0.0, 0.0) if q_norm is None else q_norm[1:]),
        *((0.0, 0.0) if k_norm is None else k_norm[1:]),
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        *keys.stride()[:2],
        *values.stride()[:2],
        tables.blocks.stride(0),
        *kv.page,
        kv.block_of_page(call.layer),
        Q_HEADS=heads,
        KV_HEADS=kv_heads,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        **form,
    )
    return out.transpose(0, 1)[None]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, dim] -> [tokens, heads, dim], its last dimension contiguous."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()

"""Attention over block tables for the packed tokens of one step.

Owns what a step's layers have in common (slots, padded tables, masks), computed once, and the arithmetic.
New K and V are written first, then everything is read back from the arena. Rows of one token are answered
together, a longer chunk by itself. Query heads that share a KV head are folded into the query length, so K
and V are never repeated. Must not know requests, sampling or where blocks come from.

Where the compiled operations are at hand (CPU) they do all of it, reading K and V where they lie; the rest
of this module is what they are compared with, and what runs elsewhere. On CUDA it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops.native import Attention, Native, Step, cache_struct

# Single-token rows are padded to the longest of their group; a row whose padding would exceed both figures
# starts a group of its own. Each group costs a few kernel launches per layer.
_PADDING_FACTOR = 2
_PADDING_TOKENS = 256


class Span(NamedTuple):
    """A request's part of the packed step. first: its first packed row. context: tokens up to its last."""

    first: int
    tokens: int
    context: int
    table: Sequence[int]


class _Group(NamedTuple):
    """Single-token rows read together. rows: packed rows, None when it is all of them in order."""

    rows: torch.Tensor | None
    blocks: torch.Tensor  # [rows * blocks per row]
    size: int  # rows
    mask: torch.Tensor  # [rows, 1, 1, keys], added to the scores


class _Chunk(NamedTuple):
    """A prompt chunk. mask None: plain causal attention of the chunk to itself."""

    first: int
    tokens: int
    blocks: torch.Tensor
    keys: int
    mask: torch.Tensor | None  # [tokens, keys]


class _Plan(NamedTuple):
    groups: list[_Group]
    chunks: list[_Chunk]


class PagedBatch:
    """Answers the attention calls of one step (see `attention.Answerer`).

    native: the compiled operations, None to do it in torch. step: the same batch in their terms.
    """

    def __init__(
        self, kv: KvView, spans: Sequence[Span], device: torch.device, native: Native | None = None
    ) -> None:
        self._kv = kv
        self._device = device
        self._spans = spans
        self._longest = max(span.context for span in spans)
        self._plans: dict[int | None, _Plan] = {}
        size, blocks, offsets = kv.tokens_per_block, [], []
        for _, tokens, context, table in spans:
            positions = range(context - tokens, context)
            blocks += [table[p // size] for p in positions]
            offsets += [p % size for p in positions]
        self._native = native
        self.step: Step | None = None
        if native is not None:
            self.step = Step(spans, torch.tensor([blocks, offsets], dtype=torch.int32))
        else:
            self._slots = torch.tensor([blocks, offsets], device=device)

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        if self._native is not None and self.step is not None:
            return self._compiled(self._native, self.step, call)
        kv = self._kv
        block, offset = self._slots
        kv.write(call.layer, block, offset, call.key[0].transpose(0, 1), call.value[0].transpose(0, 1))
        plan = self._plan(call.window)
        query = call.query[0].transpose(0, 1)  # [tokens, query heads, dim]
        if len(plan.groups) == 1 and plan.groups[0].rows is None:
            return self._decode(call, plan.groups[0], query)
        out = query.new_empty(query.shape[0], query.shape[1], call.value.shape[-1])
        for group in plan.groups:
            out[group.rows] = self._decode(call, group, query[group.rows])
        for chunk in plan.chunks:
            end = chunk.first + chunk.tokens
            out[chunk.first : end] = self._chunk(call, chunk, query[chunk.first : end])
        return out

    def _compiled(self, native: Native, step: Step, call: Call) -> torch.Tensor:
        query, key, value = (
            x[0].transpose(0, 1).float().contiguous() for x in (call.query, call.key, call.value)
        )
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        what = Attention(
            cache_struct(*self._kv.views(call.layer)),
            None if sinks is None else sinks.data_ptr(),
            query.shape[1],
            call.window or 0,
            call.scale,
            call.softcap or 0.0,
        )
        return native.attention(what, step, query, key, value).to(call.query.dtype)

    def _decode(self, call: Call, group: _Group, query: torch.Tensor) -> torch.Tensor:
        key, value = self._kv.read(call.layer, group.blocks)
        key = key.unflatten(0, (group.size, -1)).transpose(1, 2)  # [rows, KV heads, keys, dim]
        value = value.unflatten(0, (group.size, -1)).transpose(1, 2)
        folded = query.unflatten(1, (key.shape[1], -1))  # [rows, KV heads, queries per KV head, dim]
        if call.softcap is None and call.sinks is None:
            out = scaled_dot_product_attention(folded, key, value, group.mask, scale=call.scale)
        else:
            out = _plain_attention(call, folded, key, value, group.mask, tokens=1)
        return out.flatten(1, 2)

    def _chunk(self, call: Call, chunk: _Chunk, query: torch.Tensor) -> torch.Tensor:
        key, value = self._kv.read(call.layer, chunk.blocks)
        key = key[None, : chunk.keys].transpose(1, 2)  # [1, KV heads, keys, dim]
        value = value[None, : chunk.keys].transpose(1, 2)
        heads = query.transpose(0, 1)[None]  # [1, query heads, tokens, dim]
        if call.softcap is None and call.sinks is None:
            causal = chunk.mask is None
            out = scaled_dot_product_attention(
                heads, key, value, chunk.mask, is_causal=causal, scale=call.scale, enable_gqa=True
            )
        else:
            mask = chunk.mask
            if mask is None:
                mask = self._mask(torch.arange(chunk.tokens)[:, None], torch.arange(chunk.keys), None)
            folded = heads.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
            out = _plain_attention(call, folded, key, value, mask, tokens=chunk.tokens)
            out = out.unflatten(2, (-1, chunk.tokens)).flatten(1, 2)
        return out[0].transpose(0, 1)

    # --------------------------------------------------------------------------- once per step and window

    def _plan(self, window: int | None) -> _Plan:
        if window is not None and window >= self._longest:
            window = None  # every key is inside it: share the plan of the full layers
        plan = self._plans.get(window)
        if plan is None:
            chunks = [self._plan_chunk(s, window) for s in self._spans if s.tokens > 1]
            singles = [s for s in self._spans if s.tokens == 1]
            plan = self._plans[window] = _Plan(self._plan_groups(singles, window), chunks)
        return plan

    def _plan_chunk(self, span: Span, window: int | None) -> _Chunk:
        size, start = self._kv.tokens_per_block, span.context - span.tokens
        skipped = _first_key(start, window) // size
        keys = span.context - skipped * size
        blocks = torch.tensor(span.table[skipped : -(-span.context // size)], device=self._device)
        mask = None
        if start > 0 or (window is not None and window < span.tokens):
            positions = torch.arange(skipped * size, span.context)
            mask = self._mask(torch.arange(start, span.context)[:, None], positions, window)
        return _Chunk(span.first, span.tokens, blocks, keys, mask)

    def _plan_groups(self, spans: list[Span], window: int | None) -> list[_Group]:
        size = self._kv.tokens_per_block
        needed: list[tuple[Span, int, Sequence[int]]] = []  # span, its first key, blocks that hold its keys
        for span in spans:
            first = _first_key(span.context - 1, window)
            needed.append((span, first, span.table[first // size : -(-span.context // size)]))
        parts = _split(sorted(needed, key=lambda item: -len(item[2])), size)
        if len(parts) == 1 and len(spans) == len(self._spans):
            return [self._group(needed, whole=True)]
        return [self._group(part, whole=False) for part in parts]

    def _group(self, items: list[tuple[Span, int, Sequence[int]]], whole: bool) -> _Group:
        size = self._kv.tokens_per_block
        width = max(len(blocks) for _, _, blocks in items)
        padded: list[int] = []
        for _, _, blocks in items:
            padded += blocks
            padded += [blocks[0]] * (width - len(blocks))  # its own block: finite values under the mask
        base = torch.tensor([first // size * size for _, first, _ in items])[:, None]
        low = torch.tensor([first for _, first, _ in items])[:, None]
        high = torch.tensor([span.context for span, _, _ in items])[:, None]
        positions = base + torch.arange(width * size)
        mask = self._additive((positions >= low) & (positions < high))[:, None, None]
        rows = None if whole else torch.tensor([span.first for span, _, _ in items], device=self._device)
        return _Group(rows, torch.tensor(padded, device=self._device), len(items), mask)

    def _mask(self, queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
        keep = keys <= queries
        if window is not None:
            keep &= keys > queries - window
        return self._additive(keep)

    def _additive(self, keep: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(keep.shape, dtype=self._kv.dtype).masked_fill_(~keep, float("-inf"))
        return mask.to(self._device)


def _first_key(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _split(
    items: list[tuple[Span, int, Sequence[int]]], size: int
) -> list[list[tuple[Span, int, Sequence[int]]]]:
    """Cut rows (longest first) where padding to the longest of the group would cost more than a group."""
    parts: list[list[tuple[Span, int, Sequence[int]]]] = []
    for item in items:
        blocks = len(item[2])
        if parts:
            longest = len(parts[-1][0][2])
            padding = (longest - blocks) * size
            if longest <= _PADDING_FACTOR * blocks or padding <= _PADDING_TOKENS:
                parts[-1].append(item)
                continue
        parts.append([item])
    return parts


def _plain_attention(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2) or sinks (gpt-oss), which SDPA cannot do.

    query: [rows, KV heads, group * tokens, dim]. mask: broadcast over [rows, KV heads, group, tokens, keys].
    """
    scores = (query @ key.transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.unflatten(2, (-1, tokens))
    scores = (scores + mask.unsqueeze(-3) if mask.ndim > 2 else scores + mask).float()
    if call.sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sinks = call.sinks.float().view(1, key.shape[1], -1, 1, 1)
        column = sinks.expand(*scores.shape[:2], -1, tokens, 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return weights.to(value.dtype).flatten(2, 3) @ value

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
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Page, Span
from seallmd.worker.ops.native import Attention, Native, Step, cache_struct

# Single-token rows are padded to the longest of their group; a row whose padding would exceed both figures
# starts a group of its own. Each group costs a few kernel launches per layer.
_PADDING_FACTOR = 2
_PADDING_TOKENS = 256


class _Group(NamedTuple):
    """Single-token rows read together. rows: packed rows, None when it is all of them in order."""

    rows: torch.Tensor | None
    pages: torch.Tensor  # [rows * pages per row, blocks per page]
    size: int  # rows
    mask: torch.Tensor  # [rows, 1, 1, keys], added to the scores


class _Chunk(NamedTuple):
    """A prompt chunk. mask None: plain causal attention of the chunk to itself."""

    first: int
    tokens: int
    pages: torch.Tensor  # [pages, blocks per page]
    keys: int
    mask: torch.Tensor | None  # [tokens, keys]


class _Single(NamedTuple):
    """A row of one token. first_key: the oldest key that it sees. table: blocks from that key's page on."""

    span: Span
    first_key: int
    table: Sequence[int]


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
        self._native = native
        self.step = None if native is None else Step(spans)

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        if self._native is not None and self.step is not None:
            return self._compiled(self._native, self.step, call)
        key, value = call.key[0].transpose(0, 1), call.value[0].transpose(0, 1)
        self._kv.write(call.layer, *self._slots, key, value)
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
            cache_struct(self._kv, call.layer),
            None if sinks is None else sinks.data_ptr(),
            query.shape[1],
            call.window or 0,
            call.scale,
            call.softcap or 0.0,
        )
        return native.attention(what, step, query, key, value).to(call.query.dtype)

    def _decode(self, call: Call, group: _Group, query: torch.Tensor) -> torch.Tensor:
        key, value = self._kv.read(call.layer, group.pages)
        key = key.unflatten(0, (group.size, -1)).transpose(1, 2)  # [rows, KV heads, keys, dim]
        value = value.unflatten(0, (group.size, -1)).transpose(1, 2)
        folded = query.unflatten(1, (key.shape[1], -1))  # [rows, KV heads, queries per KV head, dim]
        if call.softcap is None and call.sinks is None:
            out = scaled_dot_product_attention(folded, key, value, group.mask, scale=call.scale)
        else:
            out = plain_attention(call, folded, key, value, group.mask, tokens=1)
        return out.flatten(1, 2)

    def _chunk(self, call: Call, chunk: _Chunk, query: torch.Tensor) -> torch.Tensor:
        key, value = self._kv.read(call.layer, chunk.pages)
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
            out = plain_attention(call, folded, key, value, mask, tokens=chunk.tokens)
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

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each packed token's K and V go: its page [tokens, blocks per page], its offset there."""
        (size, blocks), pages, offsets = self._kv.page, list[int](), list[int]()
        for _, tokens, context, table in self._spans:
            for position in range(context - tokens, context):
                first = position // size * blocks
                pages += table[first : first + blocks]
                offsets.append(position % size)
        return self._pages(pages), torch.tensor(offsets, device=self._device)

    def _pages(self, table: Sequence[int]) -> torch.Tensor:
        return torch.tensor(table, device=self._device).view(-1, self._kv.page.blocks)

    def _seen(self, span: Span, first_key: int) -> Sequence[int]:
        """The part of a table from the page of `first_key` to that of the last token."""
        page = self._kv.page
        skipped = first_key // page.tokens
        return span.table[skipped * page.blocks : page.holding(span.context) * page.blocks]

    def _plan_chunk(self, span: Span, window: int | None) -> _Chunk:
        size, start = self._kv.page.tokens, span.context - span.tokens
        first = _first_key(start, window)
        base = first // size * size
        mask = None
        if start > 0 or (window is not None and window < span.tokens):
            positions = torch.arange(base, span.context)
            mask = self._mask(torch.arange(start, span.context)[:, None], positions, window)
        pages = self._pages(self._seen(span, first))
        return _Chunk(span.first, span.tokens, pages, span.context - base, mask)

    def _plan_groups(self, spans: list[Span], window: int | None) -> list[_Group]:
        needed: list[_Single] = []
        for span in spans:
            first = _first_key(span.context - 1, window)
            needed.append(_Single(span, first, self._seen(span, first)))
        parts = _split(sorted(needed, key=lambda item: -len(item.table)), self._kv.page)
        if len(parts) == 1 and len(spans) == len(self._spans):
            return [self._group(needed, whole=True)]
        return [self._group(part, whole=False) for part in parts]

    def _group(self, items: list[_Single], whole: bool) -> _Group:
        size, blocks = self._kv.page
        width = max(len(item.table) for item in items)
        padded: list[int] = []
        for item in items:
            own = item.table[:blocks]  # finite values under the mask
            padded += item.table
            padded += [*own] * ((width - len(item.table)) // blocks)
        base = torch.tensor([item.first_key // size * size for item in items])[:, None]
        low = torch.tensor([item.first_key for item in items])[:, None]
        high = torch.tensor([item.span.context for item in items])[:, None]
        positions = base + torch.arange(width // blocks * size)
        mask = self._additive((positions >= low) & (positions < high))[:, None, None]
        rows = None if whole else torch.tensor([item.span.first for item in items], device=self._device)
        return _Group(rows, self._pages(padded), len(items), mask)

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


def _split(items: list[_Single], page: Page) -> list[list[_Single]]:
    """Cut rows (longest first) where padding to the longest of the group would cost more than a group."""
    parts: list[list[_Single]] = []
    for item in items:
        blocks = len(item.table)
        if parts:
            longest = len(parts[-1][0].table)
            padding = (longest - blocks) // page.blocks * page.tokens
            if longest <= _PADDING_FACTOR * blocks or padding <= _PADDING_TOKENS:
                parts[-1].append(item)
                continue
        parts.append([item])
    return parts


def plain_attention(
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

"""What each operation of a GPU takes beside plain torch, and what the GPU can do at all; `tools/bench_gpu.py`
prints it.

A decode step of 64 rows of an 8B model's shapes. On a GPU the calls run from a captured graph, so that the
device is timed and not Python; that each can be captured shows here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from seallmd.worker.ops import reference, trials
from seallmd.worker.ops.kernels import Kernels, need
from seallmd.worker.ops.reference import Norm
from seallmd.worker.quantised import Blocks
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of
from tools.sections import survives

_CALLS = 50  # in one graph


class Sizes(NamedTuple):
    """rows: tokens of the step. context: of each. heads share kv_heads; inner: of the gated unit."""

    rows: int
    context: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int


FULL = Sizes(64, 1024, 4096, 14336, 32, 8, 128)
SMALL = Sizes(2, 20, 64, 96, 4, 2, 16)


class _Pair(NamedTuple):
    name: str
    ours: Callable[[], object]
    plain: Callable[[], object]


def time_operations(device: torch.device, kernels: Kernels | None, sizes: Sizes) -> bool:
    """Print a line for each operation in use; whether all of them ran."""
    dtype, good = torch.bfloat16 if device.type == "cuda" else torch.float16, True
    for pair in () if kernels is None else _pairs(device, kernels, sizes, dtype):
        good &= survives(pair.name, partial(_compare, device, pair))
    return good


def _compare(device: torch.device, pair: _Pair) -> bool:
    mine, theirs = _seconds(device, pair.ours), _seconds(device, pair.plain)
    print(f"{pair.name:52} {mine * 1e6:8.1f} us, plain torch {theirs * 1e6:.1f}: {theirs / mine:.2f} times")
    return True


def _pairs(device: torch.device, kernels: Kernels, sizes: Sizes, dtype: torch.dtype) -> Iterator[_Pair]:
    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, y, weight = some(sizes.rows, sizes.hidden), some(sizes.rows, sizes.hidden), some(sizes.hidden)
    gate, up = some(sizes.rows, sizes.inner), some(sizes.rows, sizes.inner)
    before = Norm(weight, 1e-6, 0.0)
    for name, operation, plain, given in (
        ("norm", kernels.norm, reference.norm, (x, *before)),
        ("add+norm", kernels.add_norm, reference.add_norm, (x, y, before)),
        ("norm+add+norm", kernels.add_norm, reference.add_norm, (x, y, before, before)),
        ("gated", kernels.gated, reference.gated, (gate, up, "silu")),
    ):
        if operation is not None:
            yield _Pair(f"{name}, {sizes.rows} rows", _call(operation, *given), _call(plain, *given))
    if kernels.in_blocks is not None:
        yield from _linears(device, kernels, sizes, dtype)
    if kernels.attention is not None:
        yield from _attentions(device, kernels, sizes, dtype)


def _linears(device: torch.device, kernels: Kernels, sizes: Sizes, dtype: torch.dtype) -> Iterator[_Pair]:
    """Of 8-bit weights; beside them not their reference, but the same layer in 16 bits."""
    wide = torch.randn(sizes.inner, sizes.hidden, device=device).to(dtype)
    blocks = Blocks.empty(sizes.inner, sizes.hidden, device)
    blocks.fill(wide)
    for rows in (1, sizes.rows):
        x = torch.randn(rows, sizes.hidden, device=device).to(dtype)
        ours, plain = _call(need(kernels.in_blocks, "int8 linear"), x, blocks, None), _call(linear, x, wide)
        yield _Pair(f"int8 linear, {rows} rows (plain: 16 bits)", ours, plain)


def _attentions(device: torch.device, kernels: Kernels, sizes: Sizes, dtype: torch.dtype) -> Iterator[_Pair]:
    case = trials.Case("decode", ((1, sizes.context),) * sizes.rows)
    scene = trials.scene_of(case, device, dtype, sizes.heads, sizes.dim, sizes.kv_heads)
    tables, call = tables_of(scene.spans, scene.kv.page, device), scene.call
    plain = TableBatch(scene.kv, tables, None)
    ways = {"Triton": replace(kernels, flash=None)}
    if kernels.flash is not None and kernels.flash.takes(scene.kv, tables, call):
        ways[kernels.flash.names()] = kernels
    for way, chosen in ways.items():
        name = f"attention, {sizes.rows} rows behind {sizes.context}, {way}"
        yield _Pair(name, _call(chosen.attend, scene.kv, tables, call), _call(plain.attend, call))
    if kernels.rotate is not None:
        cos = torch.randn(sizes.rows, sizes.dim, device=device).to(dtype)
        norm = Norm(torch.ones(sizes.dim, device=device, dtype=dtype), 1e-6, 0.0)

        def turned() -> None:
            for states in (call.query, call.key):
                reference.rotate_normed(states[0].transpose(0, 1), cos, cos, norm)

        ours = _call(kernels.rotate, scene.kv, tables, call, cos, cos, norm, norm)
        yield _Pair("norms, rotation and storing (plain: without storing)", ours, turned)


def _call(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _seconds(device: torch.device, function: Callable[[], object]) -> float:
    """Of one call."""
    if device.type != "cuda":
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun
    from seallmd.worker.cuda_graphs import CudaRecorder

    graph = CudaRecorder(device).capture(lambda: [function() for _ in range(_CALLS)])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _CALLS


class Limits(NamedTuple):
    """bandwidth: bytes read a second. matrix: floating-point operations a second, in bfloat16. host: bytes a
    second from page-locked memory."""

    bandwidth: float
    matrix: float
    host: float


def measure_limits(device: torch.device, rows: int) -> Limits:
    """Best of a few; each takes a GPU so long (0.8 ms or more) that to start and await it is little of it."""
    data = torch.ones(rows * rows * 16, device=device)
    a = torch.randn(rows, rows, device=device).bfloat16()
    source = torch.ones(rows * rows, pin_memory=device.type == "cuda")
    target = data[: source.numel()]
    return Limits(
        data.nbytes / _best(device, data.sum),
        2 * rows**3 / _best(device, lambda: a @ a),
        source.nbytes / _best(device, lambda: target.copy_(source, non_blocking=True)),
    )


def _best(device: torch.device, function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        _finish(device)
        begun = time.perf_counter()
        function()
        _finish(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

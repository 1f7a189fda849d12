"""Operations on whole rows in Triton: RMSNorm, the sum before it, and the product of a gated linear unit.

Each replaces half a dozen launches of plain torch; in a decode step, whose kernels are all small, launches
are what it costs. Arithmetic is float32, rounded where a result is stored.

Must not know modules. Imports triton: only to be imported where that is there. Tested with Triton's
interpreter on a CPU; on a GPU it is unmeasured.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seallmd.worker.ops.reference import Norm

_GATED_BLOCK = 1024


@triton.jit
def _normed(numbers, weight, n, inside, eps, offset, N: tl.constexpr):
    scale = 1 / tl.sqrt(tl.sum(numbers * numbers, 0) / N + eps)
    return numbers * scale * (tl.load(weight + n, mask=inside, other=0.0).to(tl.float32) + offset)


@triton.jit
def _norm(x, weight, out, stride, eps, offset, N: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, PAD)
    inside = n < N
    numbers = tl.load(x + row * stride + n, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(numbers, weight, n, inside, eps, offset, N)
    tl.store(out + row * N + n, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(
    x,
    y,
    before,
    after,
    total,
    out,
    x_stride,
    y_stride,
    before_eps,
    before_offset,
    after_eps,
    after_offset,
    N: tl.constexpr,
    PAD: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):
    """A row of the sum, and of that through a norm. What is stored is what goes on, hence the roundings."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, PAD)
    inside = n < N
    kind = total.dtype.element_ty
    added = tl.load(y + row * y_stride + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_AFTER:
        added = _normed(added, after, n, inside, after_eps, after_offset, N).to(kind).to(tl.float32)
    numbers = tl.load(x + row * x_stride + n, mask=inside, other=0.0).to(tl.float32)
    numbers = (numbers + added).to(kind)
    tl.store(total + row * N + n, numbers, mask=inside)
    normed = _normed(numbers.to(tl.float32), before, n, inside, before_eps, before_offset, N)
    tl.store(out + row * N + n, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # x / 2 * (1 + tanh(y)) = x * sigmoid(2 y)
        activated = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        activated = g * tl.sigmoid(g)
    tl.store(out + row * n + column, (activated * u).to(out.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """As `reference.norm`, for x [..., n] of any float dtype; the result has the dtype of x."""
    n = x.shape[-1]
    rows, out = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        _norm[(rows.shape[0],)](rows, weight, out, rows.stride(0), eps, offset, N=n, **_width(n))
    return out


def add_norm(
    x: torch.Tensor, y: torch.Tensor, before: Norm, after: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.add_norm`, for x and y [..., n] of one float dtype, which the results have."""
    n, rows, added = x.shape[-1], _rows(x), _rows(y)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if rows.shape[0]:
        _add_norm[(rows.shape[0],)](
            rows,
            added,
            before.weight,
            before.weight if after is None else after.weight,
            total,
            out,
            rows.stride(0),
            added.stride(0),
            *before[1:],
            *((0.0, 0.0) if after is None else after[1:]),
            N=n,
            HAS_AFTER=after is not None,
            **_width(n),
        )
    return total, out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `reference.gated`, for [..., n] of any float dtype; the result has theirs."""
    g, u, n = _rows(gate), _rows(up), gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if g.shape[0]:
        grid = (g.shape[0], triton.cdiv(n, _GATED_BLOCK))
        gelu = activation == "gelu_tanh"
        _gated[grid](g, u, out, g.stride(0), u.stride(0), n, GELU=gelu, BLOCK=_GATED_BLOCK)
    return out


def _width(n: int) -> dict[str, int]:
    """Of a program that holds a row of n."""
    pad = triton.next_power_of_2(n)
    return {"PAD": pad, "num_warps": min(max(pad // 512, 1), 16)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, n], the last dimension contiguous; a view wherever one can be had."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()

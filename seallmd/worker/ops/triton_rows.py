"""Operations on whole rows in Triton: RMSNorm, and the product of a gated linear unit.

Each replaces half a dozen launches of plain torch; in a decode step, whose kernels are all small, launches
are what it costs. Arithmetic is float32, rounded once at the end.

Must not know modules. Imports triton: only to be imported where that is there. Tested with Triton's
interpreter on a CPU; on a GPU it is unmeasured.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATED_BLOCK = 1024


@triton.jit
def _norm(x, weight, out, stride, eps, offset, N: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, PAD)
    inside = n < N
    numbers = tl.load(x + row * stride + n, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(numbers * numbers, 0) / N + eps)
    factors = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * N + n, (numbers * scale * factors).to(out.dtype.element_ty), mask=inside)


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
        pad = triton.next_power_of_2(n)
        warps = min(max(pad // 512, 1), 16)
        _norm[(rows.shape[0],)](rows, weight, out, rows.stride(0), eps, offset, N=n, PAD=pad, num_warps=warps)
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `reference.gated`, for [..., n] of any float dtype; the result has theirs."""
    g, u, n = _rows(gate), _rows(up), gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if g.shape[0]:
        grid = (g.shape[0], triton.cdiv(n, _GATED_BLOCK))
        gelu = activation == "gelu_tanh"
        _gated[grid](g, u, out, g.stride(0), u.stride(0), n, GELU=gelu, BLOCK=_GATED_BLOCK)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, n], the last dimension contiguous; a view wherever one can be had."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()

"""Products with weights of 8 bits in blocks, in Triton.

Weights are read as they lie (`quantised.Blocks`) and widened in registers to whole numbers in the dtype of
the activations, which is exact; a block's products are summed in float32, and multiplied by its scale then.
Activations are not rounded. A decode step, which waits for memory, reads half of what 16-bit weights take.

Must not know modules. Imports triton: only to be imported where that is there. Tested with Triton's
interpreter on a CPU; on a GPU it is unmeasured.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seallmd.worker.quantised import BLOCK, PANEL, Blocks

_COLUMNS = 64  # of a program
_LEAST_ROWS, _MOST_ROWS = 16, 64  # `tl.dot` takes no fewer


@triton.jit
def _linear(
    x,
    weight,
    scale,
    bias,
    out,
    x_stride,
    rows,
    n,
    k,
    blocks_of_row,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [rows, n]. A panel has its blocks one behind the other, each as [BLOCK / 4, PANEL, 4]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, BLOCK)
    wanted, inside = row < rows, column < n
    panel, lane = (column // PANEL).to(tl.int64) * blocks_of_row, column % PANEL
    numbers_at = weight + panel[:, None] * (BLOCK * PANEL) + lane[:, None] * 4
    numbers_at += (at // 4)[None, :] * (4 * PANEL) + (at % 4)[None, :]
    scales_at = scale + panel * PANEL + lane
    given_at = x + row.to(tl.int64)[:, None] * x_stride + at[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(blocks_of_row):
        known = wanted[:, None] & (block * BLOCK + at < k)[None, :]
        given = tl.load(given_at + block * BLOCK, mask=known, other=0.0)
        stored = tl.load(numbers_at + block * (BLOCK * PANEL), mask=inside[:, None], other=128)
        numbers = (stored.to(tl.int32) - 128).to(tl.float32).to(given.dtype)
        factor = tl.load(scales_at + block * PANEL, mask=inside, other=0.0).to(tl.float32)
        total += tl.dot(given, tl.trans(numbers), input_precision=PRECISION) * factor[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=wanted[:, None] & inside[None, :])


def linear(x: torch.Tensor, blocks: Blocks, bias: torch.Tensor | None) -> torch.Tensor:
    """As `Blocks.linear`, for x [..., k] of any float dtype, which the result has."""
    given = x.reshape(-1, blocks.k)
    given = given if given.stride(1) == 1 else given.contiguous()
    rows = given.shape[0]
    out = torch.empty(*x.shape[:-1], blocks.n, dtype=x.dtype, device=x.device)
    if rows:
        form = form_of(rows, x.dtype is torch.float32)
        grid = (triton.cdiv(blocks.n, _COLUMNS), triton.cdiv(rows, form["ROWS"]))
        _linear[grid](
            given,
            blocks.weight,
            blocks.scale,
            blocks.scale if bias is None else bias,
            out,
            given.stride(0),
            rows,
            blocks.n,
            blocks.k,
            blocks.weight.shape[1],
            HAS_BIAS=bias is not None,
            **form,
        )
    return out


def form_of(rows: int, exact: bool) -> dict[str, int | str]:
    """How a program is compiled. exact: of float32 activations."""
    return {
        "ROWS": min(_MOST_ROWS, max(_LEAST_ROWS, triton.next_power_of_2(rows))),
        "COLUMNS": _COLUMNS,
        "BLOCK": BLOCK,
        "PANEL": PANEL,
        "PRECISION": "ieee" if exact else "tf32",
    }

"""Compiles the Triton operations for a GPU, which takes none: test_triton.py runs it in a process of its own.

Triton's interpreter runs what the compiler refuses (types that change, shapes that are no powers of two), and
has no limit on fast memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seallmd.worker.ops import triton_attention, triton_linear, triton_rows, triton_store

_INDICES = ("blocks", "contexts", "firsts", "counts", "tile_spans", "tile_starts", "span_of", "positions")
_SUMS = ("parts", "part_max", "part_sum")
_NUMBERS = ("scale", "softcap")
CAPABILITIES = (80, 90)  # Ampere, Hopper
FAST_BYTES = 99 << 10  # of the smaller GPUs of our time, for one program


def compile_for_gpu(
    kernel: Any, dtype: str, warps: int = 4, kinds: Mapping[str, str] = MappingProxyType({}), **constants: Any
) -> int:
    """Bytes of fast memory that a program takes. dtype: of every tensor but indices and sums, and those whose
    `kinds` are given."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in _INDICES:
            return "*i32"
        if name in _SUMS:
            return "*fp32"
        if name in kinds:
            return kinds[name]
        if name in _NUMBERS or name.endswith(("eps", "offset")):
            return "fp32"
        small = ("n", "heads", "window", "splits", "table_stride")
        plain = name in small or name.endswith(("_token", "_head", "_block", "stride")) or "page" in name
        return "i32" if plain else f"*{dtype}"

    anywhere = (*_INDICES, *_SUMS[1:])  # in a step's packed numbers, or in what all parts have in common
    loose = [p.name for p in kernel.params if p.name in anywhere and not p.do_not_specialize_on_alignment]
    if loose:  # variants would be compiled amid steps
        raise SystemExit(f"{kernel.__name__} is specialised on where {', '.join(loose)} begin")
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    options = {"num_warps": warps, "num_stages": 2}
    taken = [
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
        for capability in CAPABILITIES
    ]
    return max(taken)


def attention(dtype: str, group: int, dim: int, tile: int, **kind: bool) -> int:
    """As `triton_attention._launch` chooses."""
    wide, exact = dim > 128, dtype == "fp32"
    rows = max(16, triton.next_power_of_2(tile * group))
    flags = {"HAS_SOFTCAP": False, "HAS_SINKS": False, "HAS_WINDOW": False, "SPLIT": False} | kind
    sizes = triton_attention.sizes_of(rows, dim, exact)
    return compile_for_gpu(
        triton_attention._attend,
        dtype,
        sizes.warps,
        GROUP=group,
        K_DIM=dim - 8 * wide,
        V_DIM=dim,
        K_PAD=dim,
        V_PAD=dim,
        TILE=tile,
        ROWS=rows,
        KEYS=sizes.keys,
        PRECISION="ieee" if exact else "tf32",
        **flags,
    )


def rotation(dtype: str, width: int, dim: int, **norms: bool) -> int:
    """As `triton_store.rotate` chooses."""
    form = triton_store.rotation_form(20, dim, dim, width)
    flags = {"HAS_Q_NORM": False, "HAS_K_NORM": False} | norms
    return compile_for_gpu(
        triton_store._rotate, dtype, form.pop("num_warps"), Q_HEADS=20, KV_HEADS=2, **form, **flags
    )


def in_blocks(dtype: str, rows: int) -> int:
    """As `triton_linear.linear` chooses."""
    kinds = {"weight": "*u8", "scale": "*fp16", "rows": "i32", "k": "i32", "blocks_of_row": "i32"}
    form = triton_linear.form_of(rows, dtype == "fp32")
    return compile_for_gpu(triton_linear._linear, dtype, kinds=kinds, HAS_BIAS=True, **form)


def main() -> int:
    """Exit code 1 when something takes too much fast memory; a refusal of the compiler is an exception."""
    taken = {
        "decode": attention("bf16", 4, 128, 1, SPLIT=True, HAS_WINDOW=True),
        "chunk": attention("bf16", 4, 128, 32, HAS_SOFTCAP=True),
        "wide chunk": attention("fp16", 2, 256, 16, HAS_SINKS=True, HAS_WINDOW=True),
        "exact chunk": attention("fp32", 3, 128, 10),
        "write": compile_for_gpu(triton_store._write, "bf16", K_DIM=80, V_DIM=128, K_PAD=128, V_PAD=128),
        "combine": compile_for_gpu(
            triton_attention._combine, "bf16", V_DIM=80, V_PAD=128, TILE=1, SPLITS_PAD=16, HAS_SINKS=True
        ),
        "norm": compile_for_gpu(triton_rows._norm, "bf16", N=4000, PAD=4096),
        "add+norm": compile_for_gpu(triton_rows._add_norm, "bf16", N=4000, PAD=4096, HAS_AFTER=True),
        "rotation": rotation("bf16", 20, 96),
        "normed rotation": rotation("bf16", 128, 128, HAS_Q_NORM=True, HAS_K_NORM=True),
        "int8 linear of a row": in_blocks("bf16", 1),
        "int8 linear": in_blocks("fp16", 500),
        "exact int8 linear": in_blocks("fp32", 500),
        "gated": compile_for_gpu(triton_rows._gated, "bf16", GELU=True, BLOCK=1024),
    }
    print(taken)
    return int(max(taken.values()) > FAST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

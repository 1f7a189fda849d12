"""What an operation of a GPU has to show at a worker's start before it is in use.

Owns the trials: every operation runs on random numbers, by itself, and gives way to plain torch with a line
in the log when its result is another or it cannot be compiled; FlashAttention has to agree wherever it would
be asked, and be quicker than Triton. Keys that nobody wrote are NaN here: an operation that reads them shows
it. A trial that ends the process leaves a mark behind, and is not made again: at once where the device told a
fault, else after the second time. Must not know models or requests.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import flash, reference
from seallmd.worker.ops.kernels import NAMES, Kernels, need
from seallmd.worker.ops.reference import Norm
from seallmd.worker.paged import PagedBatch
from seallmd.worker.process import is_device_lost, one_line
from seallmd.worker.quantised import Blocks
from seallmd.worker.tables import tables_of

# Against plain torch on the same device, relative to the largest element: sums run in another order, and
# plain torch rounds more often.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_TIMED_RUNS = 20
# Of a trial that did not come back and could not say why. A start compiles for a minute or more, and whoever
# ends the daemon meanwhile kills the worker: that says nothing about the operations.
_TRIES = 2


class Case(NamedTuple):
    """One kind of attention. spans: (tokens, context) of each request."""

    name: str
    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


_MIXED = Case("chunks beside decodes", ((9, 9), (1, 131), (30, 77), (2, 64)))
CASES = (
    Case("decode", ((1, 1), (1, 70), (1, 300), (1, 33))),
    Case("a long decode", ((1, 1500),)),
    _MIXED,
    Case("sliding window", ((1, 131), (30, 77), (40, 40)), window=17),
    Case("capped scores", ((1, 131), (30, 77)), softcap=2.0),
    Case("sinks", ((1, 131), (30, 77)), sinks=True),
)
# What FlashAttention is timed on: a step of single tokens, and one with a chunk of a prompt.
_TIMED = {"decodes": Case("single tokens", ((1, 1024),) * 8), "chunks": Case("prompts", ((512, 1024),))}


class Scene(NamedTuple):
    """A step of one layer: its KV before, its spans and its call."""

    kv: KvView
    spans: list[Span]
    call: Call

    def fill_ends(self, number: float) -> None:
        """Write it wherever no token of the spans lies, in their last blocks."""
        for span in self.spans:
            for view in self.kv.views(0):
                view[span.table[-1], (span.context - 1) % self.kv.page.tokens + 1 :] = number


def scene_of(
    case: Case, device: torch.device, dtype: torch.dtype, heads: int = 8, dim: int = 64, kv_heads: int = 2
) -> Scene:
    """The same rounded random numbers on every device."""
    shape, tokens, block_tokens = LayerShape(kv_heads, dim, dim), sum(t for t, _ in case.spans), 16
    spans, at, blocks = [], 0, 0
    for count, context in case.spans:
        own = -(-context // block_tokens)
        spans.append(Span(at, count, context, list(range(blocks, blocks + own))[::-1]))
        at, blocks = at + count, blocks + own
    noise = torch.Generator().manual_seed(3)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=noise).to(dtype).to(device)

    query, key, value = (some(1, count, tokens, dim) for count in (heads, kv_heads, kv_heads))
    size = block_tokens * 2 * kv_heads * dim * dtype.itemsize
    kv = KvView(torch.zeros(blocks * size, dtype=torch.uint8, device=device), size, [shape], dtype)
    for view in kv.views(0):
        view.copy_(some(*view.shape))
    sinks = some(heads) if case.sinks else None
    scale = dim**-0.5
    call = Call(
        0, query, key, value, scale, case.window, case.softcap, sinks, bidirectional=False, unknown=()
    )
    return Scene(kv, spans, call)


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, relative to the largest element; infinite where something is not finite."""
    if ours.shape != expected.shape:
        return float("inf")
    error, size = float((ours.float() - expected.float()).abs().max()), float(expected.float().abs().max())
    if error == 0:  # of zeros too
        return 0.0
    return error / size if math.isfinite(error) and size > 0 else float("inf")


# ----------------------------------------------------------------------------------------- at the start


def start(device: torch.device, cache: Path, say: Callable[[str], None]) -> Kernels | None:
    """The operations that agree on `device`; None without any. say: told whatever falls back.

    cache: where Triton keeps what it compiled (some seconds for each operation, once per machine).
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    try:
        import triton

        from seallmd.worker.ops import triton_attention, triton_linear, triton_rows, triton_store
    except ImportError as error:
        say(f"plain torch operations: {one_line(error)}")
        return None
    tail = f"-{triton.__version__}-{torch.__version__}-{device}".replace(":", "-")
    mark, flash_mark = cache / f"triton-trial{tail}", cache / f"flash-trial{tail}"
    if _is_final(mark):
        say(f"plain torch operations: the last trial of the Triton ones ended the process (remove {mark})")
        return None
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    whole = Kernels(
        triton_attention,
        triton_store.write,
        triton_rows.norm,
        triton_rows.gated,
        triton_rows.add_norm,
        triton_store.rotate,
        triton_linear.linear,
        processors=processors,
    )
    try:
        with _marked(mark):
            agreed = tried(whole, device, say)
    except OSError as error:  # of the mark: what cannot be kept would be compiled at every start
        say(f"plain torch operations: {one_line(error)}")
        return None
    if agreed is None or agreed.attention is None:
        return agreed
    if _is_final(flash_mark):
        say(f"{flash.NAME} is not used: its last trial ended the process (remove {flash_mark})")
        return agreed
    with _marked(flash_mark):
        return with_flash(agreed, device, say)


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """A file that stays where the process does not come back: a byte a time, all at once for a fault."""
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a") as file:
        file.write(".")
    try:
        yield
    except torch.AcceleratorError:
        mark.write_text("." * _TRIES)
        raise
    mark.unlink()


def _is_final(mark: Path) -> bool:
    """Whether a trial is not to be made again."""
    return mark.exists() and mark.stat().st_size >= _TRIES


def tried(kernels: Kernels, device: torch.device, say: Callable[[str], None]) -> Kernels | None:
    """What of `kernels` agrees on `device`, None if nothing does."""
    trials = (_attention_error, _norm_error, _gated_error, _add_norm_error, _rotate_error, _blocks_error)
    failed: dict[str, Any] = {}
    for (field, name), trial in zip(NAMES.items(), trials, strict=True):
        for dtype in (torch.float32, *_short_dtypes(device)):
            problem = _problem(partial(trial, kernels, device, dtype), dtype)
            if problem:
                failed[field] = None
                say(f"{name} in plain torch, the Triton operation failed its trial in {dtype}: {problem}")
                break
    agreed = replace(kernels, **failed)
    return agreed if agreed.names() else None


def with_flash(
    kernels: Kernels,
    device: torch.device,
    say: Callable[[str], None],
    seconds_of: Callable[[Kernels, Scene, torch.device], float] | None = None,
) -> Kernels:
    """`kernels`, with FlashAttention for whatever it is right and quicker at. It says what was found.

    seconds_of: how long attention of a scene takes.
    """
    try:
        library = flash.find()
    except Exception as error:  # noqa: BLE001 - built for another torch it fails in many ways
        say(f"{flash.NAME} cannot be imported: {one_line(error)}")
        return kernels
    if library is None:
        return kernels
    both, seconds_of = replace(kernels, flash=library), seconds_of or _seconds_of
    for dtype in _short_dtypes(device):
        problem = _problem(partial(_attention_error, both, device, dtype), dtype)
        if problem:
            say(f"{flash.NAME} is not used, it failed its trial in {dtype}: {problem}")
            return kernels
    chosen = {}
    for field, case in _TIMED.items():
        scene = scene_of(case, device, _short_dtypes(device)[-1], heads=32, dim=128, kv_heads=8)
        ours, theirs = (seconds_of(candidate, scene, device) for candidate in (kernels, both))
        chosen[field] = theirs < ours
        winner, figures = (
            flash.NAME if chosen[field] else "Triton",
            f"{theirs * 1e6:.0f} us, Triton {ours * 1e6:.0f}",
        )
        say(f"attention of {case.name}: {winner} ({flash.NAME} {figures})")
    flash_for = replace(library, **chosen)  # type: ignore[arg-type]  # all of _TIMED are flags
    return replace(kernels, flash=flash_for) if any(chosen.values()) else kernels


def _short_dtypes(device: torch.device) -> list[torch.dtype]:
    """Of 16 bits, those that it computes in."""
    wide = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.float16, torch.bfloat16] if wide else [torch.float16]


def _problem(trial: Callable[[], float], dtype: torch.dtype) -> str:
    """What is wrong with an operation, nothing where it agrees."""
    try:
        off = trial()
    except Exception as error:  # compilers fail in many ways, and plain torch always runs
        if is_device_lost(error):
            raise
        return one_line(error)
    return "" if off <= TOLERANCES[dtype] else f"it is off by {off:.1e}"


def _seconds_of(kernels: Kernels, scene: Scene, device: torch.device) -> float:
    """Of one step's attention, from launches one after another."""
    tables = tables_of(scene.spans, scene.kv.page, device)
    for _ in range(3):
        kernels.attend(scene.kv, tables, scene.call)
    if device.type != "cuda":
        begun = time.perf_counter()
        kernels.attend(scene.kv, tables, scene.call)
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_TIMED_RUNS):
        kernels.attend(scene.kv, tables, scene.call)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _TIMED_RUNS


# --------------------------------------------------------------------------------------------- one each


def _attention_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(attention_error(case, kernels, device, dtype) for case in CASES)


def attention_error(
    case: Case, kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int = 8, dim: int = 64
) -> float:
    """`difference` of the kernels' attention from plain torch's."""
    theirs, mine = (scene_of(case, device, dtype, heads, dim) for _ in range(2))
    expected = PagedBatch(theirs.kv, theirs.spans, device).attend(theirs.call)
    mine.fill_ends(float("nan"))
    ours = kernels.attend(mine.kv, tables_of(mine.spans, mine.kv.page, device), mine.call)
    return max(difference(ours, expected), _stored_error(mine, theirs))


def _stored_error(mine: Scene, theirs: Scene) -> float:
    for scene in (mine, theirs):
        scene.fill_ends(0.0)
    return max(difference(a, b) for a, b in zip(mine.kv.views(0), theirs.kv.views(0), strict=True))


def _rotate_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(rotate_error(kernels, device, dtype, *kind) for kind in ((64, False), (48, True)))


def rotate_error(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, width: int, normed: bool
) -> float:
    """`difference` of rotation and storing from the reference. width: of what is rotated, of 64."""
    theirs, mine = (scene_of(_MIXED, device, dtype) for _ in range(2))
    call, tokens = theirs.call, theirs.call.query.shape[2]
    angle = _noise(tokens, width // 2, 5)
    cos, sin = (torch.cat((part, part), -1).to(device, dtype) for part in (angle.cos(), angle.sin()))
    norms = [Norm(_noise(1, 64, 6 + n)[0].to(device, dtype), 1e-6, 1.0) if normed else None for n in range(2)]
    query, key = (
        reference.rotate_normed(x[0].transpose(0, 1).float(), cos.float(), sin.float(), norm)
        for x, norm in zip((call.query, call.key), norms, strict=True)
    )
    stored = call._replace(key=key.to(dtype).transpose(0, 1)[None])
    PagedBatch(theirs.kv, theirs.spans, device).attend(stored)
    tables = tables_of(mine.spans, mine.kv.page, device)
    ours = need(kernels.rotate, "rotation")(mine.kv, tables, mine.call, cos, sin, *norms)
    return max(difference(ours[0].transpose(0, 1), query), _stored_error(mine, theirs))


def _norm_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(
        norm_error(kernels, device, dtype, n, offset) for n in (64, 576, 4096) for offset in (0.0, 1.0)
    )


def norm_error(kernels: Kernels, device: torch.device, dtype: torch.dtype, n: int, offset: float) -> float:
    """`difference` of the norm from the reference in float32."""
    x, weight = _noise(5, n, 1).to(device, dtype), _noise(1, n, 2)[0].to(device, dtype)
    ours = need(kernels.norm, "norm")(x, weight, 1e-6, offset)
    return difference(ours, reference.norm(x.float(), weight, 1e-6, offset))


def _add_norm_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(
        add_norm_error(kernels, device, dtype, n, sandwich) for n in (576, 4096) for sandwich in (False, True)
    )


def add_norm_error(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, n: int, sandwich: bool
) -> float:
    """`difference` of sum and norm from the reference in float32. sandwich: with a norm before the sum."""
    x, y = (_noise(5, n, seed).to(device, dtype) for seed in (1, 2))
    before, after = (Norm(_noise(1, n, seed)[0].to(device, dtype), 1e-6, 1.0) for seed in (3, 4))
    norms = (before, after if sandwich else None)
    ours = need(kernels.add_norm, "add+norm")(x, y, *norms)
    expected = reference.add_norm(x.float(), y.float(), *norms)
    return max(difference(a, b) for a, b in zip(ours, expected, strict=True))


def _gated_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(gated_error(kernels, device, dtype, name) for name in reference.ACTIVATIONS)


def gated_error(kernels: Kernels, device: torch.device, dtype: torch.dtype, activation: str) -> float:
    """`difference` of the gated product from the reference in float32."""
    gate, up = (3 * _noise(5, 1500, seed).to(device, dtype) for seed in (1, 2))
    ours = need(kernels.gated, "gated")(gate, up, activation)
    return difference(ours, reference.gated(gate.float(), up.float(), activation))


def _blocks_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(blocks_error(kernels, device, dtype, *kind) for kind in ((1, 576, 200), (70, 100, 64)))


def blocks_error(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int
) -> float:
    """`difference` of a linear layer [n, k] of 8-bit weights from the reference in float32."""
    blocks = Blocks.empty(n, k, device)
    blocks.fill(_noise(n, k, 1).to(device))
    x, bias = _noise(rows, k, 2).to(device, dtype), _noise(1, n, 3)[0].to(device, dtype)
    ours = need(kernels.in_blocks, "int8 linear")(x, blocks, bias)
    return difference(ours, blocks.linear(x.float(), bias))


def _noise(rows: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))

"""The Triton operations of a GPU, each in use only where it agreed with plain torch on that GPU.

Owns which of them are in use, and the trial at a worker's start: every operation runs on random numbers, by
itself, and gives way to plain torch with a line in the log when its result is another or it cannot be
compiled. A trial that ends the process (a fault of a GPU is fatal to it) leaves a mark behind, and is not
made again. Must not know models or requests, and imports triton only for the trial.

On a GPU it is unmeasured: nobody has run it there yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from seallmd.core.messages import LayerShape
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import reference
from seallmd.worker.paged import PagedBatch
from seallmd.worker.process import one_line
from seallmd.worker.tables import Tables, tables_of

# Against plain torch on the same device, relative to the largest element: sums run in another order, and
# plain torch rounds more often.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_MARK = "triton-trial"


@dataclass(frozen=True)
class Kernels:
    """Operations that agreed; None for one that did not. processors: multiprocessors of the device."""

    attention: ModuleType | None
    norm: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor] | None
    gated: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor] | None
    processors: int = 1

    def attend(self, kv: KvView, tables: Tables, call: Call) -> torch.Tensor:
        """Store the new K and V of a layer, and answer as `Answerer.attend`."""
        if self.attention is None:
            raise RuntimeError("attention is not among these kernels")
        self.attention.write(kv, tables, call)
        out: torch.Tensor = self.attention.attend(kv, tables, call, self.processors)
        return out

    def names(self) -> list[str]:
        """Of the operations in use."""
        return [name for name in ("attention", "norm", "gated") if getattr(self, name) is not None]


class Case(NamedTuple):
    """One kind of attention. spans: (tokens, context) of each request."""

    name: str
    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = (
    Case("decode", ((1, 1), (1, 70), (1, 300), (1, 33))),
    Case("a long decode", ((1, 1500),)),
    Case("chunks beside decodes", ((9, 9), (1, 131), (30, 77), (2, 64))),
    Case("sliding window", ((1, 131), (30, 77), (40, 40)), window=17),
    Case("capped scores", ((1, 131), (30, 77)), softcap=2.0),
    Case("sinks", ((1, 131), (30, 77)), sinks=True),
)


class Scene(NamedTuple):
    """A step of one layer: its KV before, its spans and its call."""

    kv: KvView
    spans: list[Span]
    call: Call


def scene_of(case: Case, device: torch.device, dtype: torch.dtype, heads: int = 8, dim: int = 64) -> Scene:
    """The same rounded random numbers on every device."""
    shape, tokens, block_tokens = LayerShape(2, dim, dim), sum(t for t, _ in case.spans), 16
    spans, at, blocks = [], 0, 0
    for count, context in case.spans:
        need = -(-context // block_tokens)
        spans.append(Span(at, count, context, list(range(blocks, blocks + need))[::-1]))
        at, blocks = at + count, blocks + need
    noise = torch.Generator().manual_seed(3)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=noise).to(dtype).to(device)

    query, key, value = some(1, heads, tokens, dim), some(1, 2, tokens, dim), some(1, 2, tokens, dim)
    size = block_tokens * 4 * dim * dtype.itemsize
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
    error = float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())
    return float("inf") if math.isnan(error) else error


def start(device: torch.device, cache: Path, say: Callable[[str], None]) -> Kernels | None:
    """The operations that agree on `device`; None without any. say: told whatever falls back.

    cache: where Triton keeps what it compiled (some seconds for each operation, once per machine).
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    try:
        import triton

        from seallmd.worker.ops import triton_attention, triton_rows
    except ImportError as error:
        say(f"plain torch operations: {one_line(error)}")
        return None
    mark = cache / f"{_MARK}-{triton.__version__}-{torch.__version__}-{device}".replace(":", "-")
    if mark.exists():
        say(f"plain torch operations: the last trial of the Triton ones ended the process (remove {mark})")
        return None
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    whole = Kernels(triton_attention, triton_rows.norm, triton_rows.gated, processors)
    with _marked(mark):
        return tried(whole, device, say)


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """A file that stays where the process does not come back."""
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    yield
    mark.unlink()


def tried(kernels: Kernels, device: torch.device, say: Callable[[str], None]) -> Kernels | None:
    """What of `kernels` agrees on `device`, None if nothing does."""
    trials = {"attention": _attention_error, "norm": _norm_error, "gated": _gated_error}
    dtypes = [torch.float32, torch.float16]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append(torch.bfloat16)
    failed = {}
    for name, trial in trials.items():
        for dtype in dtypes:
            problem = _problem(lambda trial=trial, dtype=dtype: trial(kernels, device, dtype), dtype)  # type: ignore[misc]
            if problem:
                failed[name] = None
                say(f"{name} in plain torch, the Triton operation failed its trial in {dtype}: {problem}")
                break
    agreed = Kernels(**{**vars(kernels), **failed})
    return agreed if agreed.names() else None


def _problem(trial: Callable[[], float], dtype: torch.dtype) -> str:
    """What is wrong with an operation, nothing where it agrees."""
    try:
        error = trial()
    except torch.AcceleratorError:
        raise  # the device is lost to this process
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and plain torch always runs
        return one_line(error)
    return "" if error <= TOLERANCES[dtype] else f"it is off by {error:.1e}"


def _attention_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(attention_error(case, kernels, device, dtype) for case in CASES)


def attention_error(
    case: Case, kernels: Kernels, device: torch.device, dtype: torch.dtype, heads: int = 8, dim: int = 64
) -> float:
    """`difference` of the kernels' attention from plain torch's."""
    theirs, mine = (scene_of(case, device, dtype, heads, dim) for _ in range(2))
    expected = PagedBatch(theirs.kv, theirs.spans, device).attend(theirs.call)
    ours = kernels.attend(mine.kv, tables_of(mine.spans, mine.kv.page, device), mine.call)
    stored = max(difference(a, b) for a, b in zip(mine.kv.views(0), theirs.kv.views(0), strict=True))
    return max(difference(ours, expected), stored)


def _norm_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(
        norm_error(kernels, device, dtype, n, offset) for n in (64, 576, 4096) for offset in (0.0, 1.0)
    )


def norm_error(kernels: Kernels, device: torch.device, dtype: torch.dtype, n: int, offset: float) -> float:
    """`difference` of the norm from the reference in float32."""
    if kernels.norm is None:
        raise RuntimeError("norm is not among these kernels")
    x, weight = _noise(5, n, 1).to(device, dtype), _noise(1, n, 2)[0].to(device, dtype)
    ours = kernels.norm(x, weight, 1e-6, offset)
    return difference(ours, reference.norm(x.float(), weight, 1e-6, offset))


def _gated_error(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    return max(gated_error(kernels, device, dtype, name) for name in reference.ACTIVATIONS)


def gated_error(kernels: Kernels, device: torch.device, dtype: torch.dtype, activation: str) -> float:
    """`difference` of the gated product from the reference in float32."""
    if kernels.gated is None:
        raise RuntimeError("gated is not among these kernels")
    gate, up = (3 * _noise(5, 1500, seed).to(device, dtype) for seed in (1, 2))
    ours = kernels.gated(gate, up, activation)
    return difference(ours, reference.gated(gate.float(), up.float(), activation))


def _noise(rows: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))

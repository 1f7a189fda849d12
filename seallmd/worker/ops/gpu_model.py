"""Puts the Triton operations into a module tree, and tries its attention with them.

Owns what is replaced in a model on a GPU and why it may be: norms and gated units that compute what the
operations compute, on random input with the weights at hand. Its attention uses the kernels where every layer
gave what plain torch gives, for a prompt and for a token behind it. Must not know requests or messages.

On a GPU it is unmeasured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seallmd.core.messages import LayerShape
from seallmd.worker.attention import Call, answered_by
from seallmd.worker.kv import Span
from seallmd.worker.ops.kernels import TOLERANCES, Kernels, difference
from seallmd.worker.ops.layers import probe_kv
from seallmd.worker.ops.modules import recognise_activation, recognise_norm
from seallmd.worker.paged import PagedBatch
from seallmd.worker.process import one_line
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of

_PROMPT = 7
_LONG = 600  # tokens: so many that the keys are read in parts


def install(model: nn.Module, kernels: Kernels) -> None:
    """Replace the forward of what is recognised. The weights must be bound, and real."""
    for module in model.modules():
        if kernels.norm is not None and (norm := recognise_norm(module)) is not None:
            module.forward = KernelNorm(module, kernels.norm, *norm)
        elif kernels.gated is not None and (unit := recognise_gated(module, kernels.gated)) is not None:
            module.forward = unit


class KernelNorm:
    """A recognised RMSNorm."""

    def __init__(
        self, module: nn.Module, norm: Callable[..., torch.Tensor], eps: float, offset: float
    ) -> None:
        self._module, self._norm, self._eps, self._offset = module, norm, eps, offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n]."""
        return self._norm(x, self._module._parameters["weight"], self._eps, self._offset)


class KernelGated:
    """A gated linear unit of three linear layers."""

    def __init__(self, module: Any, gated: Callable[..., torch.Tensor], activation: str) -> None:
        self._module, self._gated, self._activation = module, gated, activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden]."""
        module = self._module
        out: torch.Tensor = module.down_proj(
            self._gated(module.gate_proj(x), module.up_proj(x), self._activation)
        )
        return out


def recognise_gated(module: nn.Module, gated: Callable[..., torch.Tensor]) -> KernelGated | None:
    """The forward of `module` with the operation in it, where it gives the same."""
    linears = [module._modules.get(f"{name}_proj") for name in ("gate", "up", "down")]
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    activation = recognise_activation(getattr(module, "act_fn", None))
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())  # tensor parallelism
    if activation is None or hooked:
        return None
    unit, weight = KernelGated(module, gated, activation), linears[0].weight  # type: ignore[union-attr]
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight)
    try:
        agrees = difference(unit(x), type(module).forward(module, x)) <= TOLERANCES[weight.dtype]
    except torch.AcceleratorError:
        raise
    except (RuntimeError, TypeError, KeyError):  # it takes other inputs, or an unusual dtype
        return None
    return unit if agrees else None


def replaced(model: PreTrainedModel, layers: int) -> tuple[tuple[str, int], ...]:
    """(kind of module, how many of it run on the operations). layers: those whose attention does."""
    found = Counter(type(module.__dict__.get("forward")) for module in model.modules())
    counts = (("attention", layers), ("norms", found[KernelNorm]), ("gates", found[KernelGated]))
    return tuple((f"{name} (Triton)", count) for name, count in counts if count)


class _Comparing:
    """Answers in plain torch, and remembers how far off the kernels were (see `attention.Answerer`)."""

    def __init__(self, plain: PagedBatch, ours: TableBatch) -> None:
        self._plain, self._ours = plain, ours
        self.worst = 0.0

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        expected = self._plain.attend(call)
        self.worst = max(self.worst, difference(self._ours.attend(call), expected))
        return expected


def fitted(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    dtype: torch.dtype,
    context: int,
    kernels: Kernels,
    say: Callable[[str], None],
) -> Kernels:
    """`kernels`, less attention where a layer of `model` disagrees. shapes, dtype: of its layers' KV.

    context: its limit in tokens. This also compiles what its steps will need.
    """
    if kernels.attention is None:
        return kernels
    device = next(model.parameters()).device
    longest, worst = min(_LONG, context), 0.0
    plain, ours = (probe_kv(shapes, dtype, device, longest) for _ in range(2))
    table = list(range(plain.page.holding(longest)))[::-1]
    steps = [(tokens, end) for tokens, end in ((_PROMPT, _PROMPT), (1, _PROMPT + 1)) if end <= longest]
    try:
        for tokens, end in (*steps, (1, longest)):  # what nobody wrote is zeros
            spans = [Span(0, tokens, end, table)]
            kernel_batch = TableBatch(ours, tables_of(spans, ours.page, device), kernels)
            answerer = _Comparing(PagedBatch(plain, spans, device), kernel_batch)
            positions = torch.arange(end - tokens, end, device=device)[None]
            with torch.inference_mode(), answered_by(answerer):
                model(input_ids=positions * 31 % _vocabulary(model), position_ids=positions, use_cache=False)
            worst = max(worst, answerer.worst)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and plain torch always runs
        problem = one_line(error)
    else:
        problem = "" if worst <= TOLERANCES[dtype] else f"it is off by {worst:.1e}"
    if not problem:
        return kernels
    say(f"attention of {model.config.model_type} in plain torch, the Triton operation failed: {problem}")
    return replace(kernels, attention=None)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])

"""Puts the operations of a GPU into a module tree, and tries its attention with them.

Owns the order: norms and gated units that compute what the operations compute, then attention, then decoder
layers and their stack. Attention uses the kernels where every layer gave what plain torch gives, for a
prompt, for a token behind it and for one behind a long text, in pages as long as the service's own. Must not
know requests or messages.

On a GPU it is unmeasured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops.gpu_layers import KernelBackend, KernelLayer, KernelStack
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.layers import hooked, probe_kv, run_probe
from seallmd.worker.ops.modules import KnownNorm, KnownNorms, known_norms, recognise_activation
from seallmd.worker.ops.stack import install_layers
from seallmd.worker.ops.trials import TOLERANCES, difference
from seallmd.worker.paged import PagedBatch
from seallmd.worker.process import one_line
from seallmd.worker.quantised import REST_DTYPE, QuantisedLinear, is_linear, shape_of
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of

_PROMPT = 7
_LONG = 600  # tokens: so many that the keys are read in parts


def install(
    model: PreTrainedModel, kv: KvView, context: int, kernels: Kernels, say: Callable[[str], None]
) -> Kernels | None:
    """Replace what is recognised in `model`; returns what its attention runs on, None for plain torch.

    kv: of its service. context: its limit in tokens. The weights must be bound, and real. This also compiles
    what its steps will need.
    """
    norms = _install_modules(model, kernels)
    fitted = _fitted(model, kv, context, kernels, say)
    backend = KernelBackend(fitted, next(model.parameters()).device, kv.dtype)
    if fitted.add_norm is not None or backend.rotates:
        try:
            install_layers(model, kv.shapes, context, norms, backend)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways; the stock layers always run
            _restore_layers(model)
            say(f"layers of {model.config.model_type} run as they are: {one_line(error)}")
    return fitted if fitted.attention is not None else None


def replaced(model: PreTrainedModel, attention: Kernels | None, layers: int) -> tuple[tuple[str, int], ...]:
    """(kind of module, how many of it run on the operations). attention: what its `layers` run on."""
    found = Counter(type(module.__dict__.get("forward")) for module in model.modules())
    kinds: dict[str, type] = {
        "stack of all layers": KernelStack,
        "decoder layers": KernelLayer,
        "norms": KernelNorm,
        "gates": KernelGated,
        "int8 linear layers": KernelBlocks,
    }
    counts = {f"{name} (Triton)": found[kind] for name, kind in kinds.items()}
    if attention is not None:
        counts["attention (Triton)"] = layers
        if attention.flash is not None:
            counts[f"attention ({attention.flash.names()})"] = layers
    return tuple((name, count) for name, count in counts.items() if count)


# ---------------------------------------------------------------------------------------------- modules


class KernelNorm:
    """A recognised RMSNorm."""

    def __init__(self, norm: KnownNorm, operation: Callable[..., torch.Tensor]) -> None:
        self._norm, self._operation = norm, operation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n]."""
        return self._operation(x, *self._norm.bound)


class KernelBlocks:
    """A linear layer of 8-bit weights."""

    def __init__(self, module: QuantisedLinear, operation: Callable[..., torch.Tensor]) -> None:
        self._module, self._operation = module, operation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k]."""
        return self._operation(x, self._module.blocks, self._module.bias)


class KernelGated:
    """A gated linear unit of three linear layers, whose hooks run."""

    def __init__(self, module: Any, gated: Callable[..., torch.Tensor], activation: str) -> None:
        self._module, self._gated, self._activation = module, gated, activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden]."""
        module = self._module
        out: torch.Tensor = module.down_proj(
            self._gated(module.gate_proj(x), module.up_proj(x), self._activation)
        )
        return out


def _install_modules(model: nn.Module, kernels: Kernels) -> KnownNorms:
    norms = known_norms(model)
    for module in model.modules():
        if module in norms and kernels.norm is not None:
            module.forward = KernelNorm(norms[module], kernels.norm)
        elif isinstance(module, QuantisedLinear) and kernels.in_blocks is not None:
            module.forward = KernelBlocks(module, kernels.in_blocks)  # type: ignore[method-assign]
        elif kernels.gated is not None and (unit := recognise_gated(module, kernels.gated)) is not None:
            module.forward = unit
    return norms


def recognise_gated(module: nn.Module, gated: Callable[..., torch.Tensor]) -> KernelGated | None:
    """The forward of `module` with the operation in it, where it gives the same."""
    linears = [module._modules.get(f"{name}_proj") for name in ("gate", "up", "down")]
    if not all(map(is_linear, linears)):
        return None
    function = getattr(module, "act_fn", None)
    activation = recognise_activation(function)
    if activation is None or (isinstance(function, nn.Module) and hooked(function)):
        return None
    unit, first = KernelGated(module, gated, activation), linears[0]
    x = torch.randn(3, shape_of(first)[1], generator=torch.Generator().manual_seed(1)).to(
        first.weight.device,
        REST_DTYPE if isinstance(first, QuantisedLinear) else first.weight.dtype,
    )
    try:
        agrees = difference(unit(x), type(module).forward(module, x)) <= TOLERANCES[x.dtype]
    except torch.AcceleratorError:
        raise
    except (RuntimeError, TypeError, KeyError):  # it takes other inputs, or an unusual dtype
        return None
    return unit if agrees else None


def _restore_layers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), KernelLayer | KernelStack):
            del module.forward


# -------------------------------------------------------------------------------------------- attention


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


def _fitted(
    model: PreTrainedModel, kv: KvView, context: int, kernels: Kernels, say: Callable[[str], None]
) -> Kernels:
    """`kernels`, less those that give another attention than plain torch in a layer of `model`."""
    kind = model.config.model_type
    if kernels.flash is not None and (problem := _problem(model, kv, context, kernels)):
        say(f"attention of {kind} without {kernels.flash.names()}: {problem}")
        kernels = replace(kernels, flash=None)
    if kernels.attention is not None and (problem := _problem(model, kv, context, kernels)):
        say(f"attention of {kind} in plain torch, the Triton operation failed: {problem}")
        kernels = replace(kernels, attention=None)
    return kernels


def _problem(model: PreTrainedModel, kv: KvView, context: int, kernels: Kernels) -> str:
    """What is wrong with the kernels' attention in this model, nothing where it agrees."""
    device, longest = next(model.parameters()).device, min(_LONG, context)
    longest -= longest > 1 and longest % kv.page.tokens == 0  # the last page has an end that is not written
    plain, ours = (probe_kv(kv.shapes, kv.dtype, device, longest, kv.page.tokens) for _ in range(2))
    table = list(range(plain.page.holding(longest)))[::-1]
    _spoil(ours, table[-1], (longest - 1) % plain.page.tokens + 1)
    steps = [(tokens, end) for tokens, end in ((_PROMPT, _PROMPT), (1, _PROMPT + 1)) if end <= longest]
    worst = 0.0
    try:
        for tokens, end in (*steps, (1, longest)):  # what nobody wrote before that is zeros
            spans = [Span(0, tokens, end, table)]
            kernel_batch = TableBatch(ours, tables_of(spans, ours.page, device), kernels)
            answerer = _Comparing(PagedBatch(plain, spans, device), kernel_batch)
            run_probe(model, answerer, device, range(end - tokens, end))
            worst = max(worst, answerer.worst)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and plain torch always runs
        return one_line(error)
    return "" if worst <= TOLERANCES[kv.dtype] else f"it is off by {worst:.1e}"


def _spoil(kv: KvView, block: int, used: int) -> None:
    """NaN behind the tokens of a block: what reads keys that nobody wrote shows it."""
    for layer in range(kv.layers):
        for view in kv.views(layer):
            view[block, used:] = float("nan")

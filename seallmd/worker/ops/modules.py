"""Puts the operations into a module tree: linear layers, RMSNorms, embeddings, whole decoder layers.

Owns what is replaced in a model and why it may be. Nothing is replaced for its name: linear layers by
their exact type, everything else because it computes the same as the reference on random input with the
weights at hand. What is not recognised stays as transformers wrote it. Must not know requests or messages.

A 16-bit model on a CPU runs with float32 activations, if all of it can: 16-bit weights are read as they
are and multiplied in float32, which costs no speed here and loses no precision beyond the weights' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from seallmd.worker.ops import reference
from seallmd.worker.ops.native import DTYPE_CODES, Linear, Native, linear_struct, norm_struct
from seallmd.worker.quantised import QuantisedEmbedding, QuantisedLinear, looked_up, shadow_of, shape_of

# Against the reference, relative to the largest element: sums run in another order.
TOLERANCE = 1e-5


class KnownNorm(NamedTuple):
    """A module that was recognised as an RMSNorm."""

    module: nn.Module
    eps: float
    offset: float

    @property
    def bound(self) -> reference.Norm:
        """As operations take it, with the weight that is bound now."""
        return reference.Norm(self.module._parameters["weight"], self.eps, self.offset)


KnownNorms = dict[nn.Module, KnownNorm]


def install(model: nn.Module, native: Native) -> KnownNorms:
    """Replace the forward of what is recognised; returns its norms. The weights must be bound, and real."""
    norms = known_norms(model)
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.forward = FastBlocks(module, native)  # type: ignore[method-assign]
        elif type(module) is nn.Linear and module.weight.dtype in DTYPE_CODES:
            module.forward = FastLinear(module, native)
        elif module in norms:
            module.forward = FastNorm(norms[module], native)
    return norms


def known_norms(model: nn.Module) -> KnownNorms:
    """The RMSNorms of a model. The weights must be bound, and real."""
    found = {module: recognise_norm(module) for module in model.modules()}
    return {module: KnownNorm(module, *norm) for module, norm in found.items() if norm is not None}


def widen_embeddings(model: nn.Module) -> None:
    """Have every embedding give float32, computed from its rows in float32 (Gemma scales them there)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.forward = WideEmbedding(module)


def restore(model: nn.Module) -> None:
    """Take every replacement out again."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def recognise_norm(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) if `module` is an RMSNorm, as its output shows."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or len(module._parameters) != 1 or not isinstance(eps, float):
        return None
    x = _noise(3, weight.numel()).to(weight.device)
    expected = _run(module, x)
    for offset in (0.0, 1.0):
        if expected is not None and close(reference.norm(x, weight, eps, offset), expected):
            return eps, offset
    return None


def recognise_activation(function: Any) -> str | None:
    """The name in `reference.ACTIVATIONS` of what a function computes."""
    if not callable(function):
        return None
    x = torch.linspace(-9, 9, 64)
    return next((name for name, ours in reference.ACTIVATIONS.items() if close(ours(x), function(x))), None)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether both are the same but for rounding; never where something is not finite."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max())


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _run(module: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor | None:
    """The module's own output, None where it cannot take these inputs."""
    try:
        out = module(*inputs)
    except (RuntimeError, TypeError, ValueError):
        return None
    return out if isinstance(out, torch.Tensor) else None


def struct_of(linear: nn.Linear) -> Linear:
    """Where the weights of a linear layer lie, quantised or not. They must be bound."""
    weight = linear.blocks if isinstance(linear, QuantisedLinear) else linear._parameters["weight"]
    return linear_struct(weight, linear._parameters["bias"])


class FastLinear:
    """The forward of a linear layer on a CPU; other inputs go to the stock one."""

    def __init__(self, module: nn.Linear, native: Native) -> None:
        self._module, self._native = module, native

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n], in the dtype of x."""
        module = self._module
        if x.device.type != "cpu" or module._parameters["weight"].device.type != "cpu":
            return type(module).forward(module, x)
        if not x.numel():  # no row of a prompt's chunk draws a token; torch wants one dtype even of nothing
            return x.new_empty((*x.shape[:-1], shape_of(module)[0]))
        struct = struct_of(module)
        if x.dtype is torch.float32:
            return self._native.linear(x.contiguous(), struct)
        return self._native.linear(x.float().contiguous(), struct).to(x.dtype)


class FastBlocks(FastLinear):
    """The same of 8-bit weights: another operation, and another name in what people are told."""


class FastNorm:
    """A recognised RMSNorm; inputs other than float32 on a CPU go to the module itself."""

    def __init__(self, norm: KnownNorm, native: Native) -> None:
        self._norm, self._native = norm, native

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n]."""
        norm, module = self._norm.bound, self._norm.module
        if x.dtype is not torch.float32 or x.device.type != "cpu" or norm.weight.device.type != "cpu":
            return type(module).forward(module, x)
        return self._native.norm(x.contiguous(), norm_struct(*norm))


class WideEmbedding:
    """An embedding, whatever its class does with the rows, as if its table were float32.

    Only the rows that are asked for are widened: the class runs on a table of these rows alone. The table may
    be quantised later on.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._module, self._shadow = module, shadow_of(module)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids -> [..., dim] float32."""
        module, numbers = self._module, ids.flatten()
        if isinstance(module, QuantisedEmbedding):
            rows = module.blocks.rows(numbers)
        else:
            rows = module._parameters["weight"][numbers].float()
        return looked_up(self._shadow, rows, ids)

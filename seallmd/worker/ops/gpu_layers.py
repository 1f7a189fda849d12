"""Decoder layers on a GPU: linear layers as they are, and between them the fused operations.

Owns the flow of a layer's numbers through them. The sum that ends one half of a layer is left to the norm
that begins the next half, so that one launch does both, across layers too where a whole stack runs; rotation
and the norms of query and key happen while K and V are stored. Each gives way to plain torch by itself.
Linear layers and MLPs are called as modules: a mixture of experts works, and so do the hooks of tensor
parallelism. What is a layer, and that it agrees, is `layers`' and `stack`'s business. Must not know requests.

Nothing here waits for the device, and shapes follow from the input's: a graph can be captured of it. On a
GPU it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from seallmd.worker.attention import Answerer, Call, answering
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import reference
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.layers import Layer, Parts, Rotation
from seallmd.worker.ops.modules import KnownNorm
from seallmd.worker.ops.stack import Stack
from seallmd.worker.ops.trials import TOLERANCES
from seallmd.worker.paged import PagedBatch
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of


class KernelBackend:
    """As `stack.StackBackend`, on a GPU."""

    def __init__(self, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._kernels = device, dtype, kernels
        self.tolerance = self.stack_tolerance = TOLERANCES[dtype]

    @property
    def rotates(self) -> bool:
        """Whether rotation and storing are one."""
        return self._kernels.attention is not None and self._kernels.rotate is not None

    def takes(self, parts: Parts) -> bool:
        """Any with the norms of query and key both there or both not."""
        return (parts.q_norm is None) == (parts.k_norm is None)

    def called(self, parts: Parts) -> set[nn.Module]:
        """As `layers.Backend.called`."""
        return {parts.q, parts.k, parts.v, parts.o, *parts.mlp.modules()}

    def answerer(self, kv: KvView, spans: Sequence[Span]) -> Answerer:
        """As `layers.Backend.answerer`."""
        if self._kernels.attention is None:
            return PagedBatch(kv, spans, self.device)
        return TableBatch(kv, tables_of(spans, kv.page, self.device), self._kernels)

    def layer(self, module: nn.Module, parts: Parts, call: Call) -> Layer:
        """As `layers.Backend.layer`."""
        return KernelLayer(module, parts, call, self._kernels)

    def stack(self, module: Any, layers: Sequence[Any], norm: KnownNorm) -> Stack:
        """As `StackBackend.stack`."""
        return KernelStack(module, layers, norm, self._kernels)


class _Flow(NamedTuple):
    """Hidden states on their way: x + after(y), which the next norm is to add up. y None: x alone."""

    x: torch.Tensor
    y: torch.Tensor | None = None
    after: KnownNorm | None = None

    def total(self) -> torch.Tensor:
        """The states."""
        if self.y is None:
            return self.x
        return self.x + (self.y if self.after is None else self.after.module(self.y))

    def into(self, norm: KnownNorm, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        """The states, and these through a norm."""
        if self.y is None or kernels.add_norm is None:
            total = self.total()
            return total, norm.module(total)
        after = None if self.after is None else self.after.bound
        return kernels.add_norm(self.x, self.y, norm.bound, after)


class KernelLayer(Layer):
    """The forward of a recognised layer."""

    def __init__(self, module: nn.Module, parts: Parts, call: Call, kernels: Kernels) -> None:
        super().__init__(module, call)
        self._parts, self._call, self._kernels = parts, call, kernels

    def __call__(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """As the layer's own forward, which runs outside a step."""
        rotation = named.get("position_embeddings")
        if rotation is None or answering() is None:
            return type(self.module).forward(self.module, hidden_states, *rest, **named)
        return self.advance(_Flow(hidden_states), rotation).total()

    def advance(self, flow: _Flow, rotation: Rotation) -> _Flow:
        """The states behind the layer."""
        parts = self._parts
        x, normed = flow.into(parts.before_attention, self._kernels)
        attended = _Flow(x, self._attention(normed, *rotation), parts.after_attention)
        x, normed = attended.into(parts.before_mlp, self._kernels)
        return _Flow(x, parts.mlp(normed), parts.after_mlp)

    def _attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        parts = self._parts
        query, key, value = (  # [1, heads, tokens, dim]
            linear(x).unflatten(-1, (-1, like.shape[3])).transpose(1, 2)
            for linear, like in zip((parts.q, parts.k, parts.v), self._call[1:4], strict=True)
        )
        norms = [None if norm is None else norm.bound for norm in (parts.q_norm, parts.k_norm)]
        answerer: Any = answering()
        if isinstance(answerer, TableBatch) and answerer.rotates:
            call = self._call._replace(query=query, key=key, value=value)
            out = answerer.attend_rotated(call, cos, sin, *norms)
        else:
            query, key = (_rotated(x, cos, sin, n) for x, n in zip((query, key), norms, strict=True))
            out = answerer.attend(self._call._replace(query=query, key=key, value=value))
        attended: torch.Tensor = parts.o(out.flatten(1)[None])
        return attended


def _rotated(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: reference.Norm | None
) -> torch.Tensor:
    rows = reference.rotate_normed(states[0].transpose(0, 1), cos[0], sin[0], norm)
    return rows.to(states.dtype).transpose(0, 1)[None]


class KernelStack(Stack):
    """All layers without transformers' loop: no sum is left outside a norm."""

    def __init__(self, module: Any, layers: Sequence[Any], norm: KnownNorm, kernels: Kernels) -> None:
        super().__init__(module, layers)
        self._norm, self._kernels = norm, kernels

    def ready(self) -> bool:
        """As `Stack.ready`."""
        return answering() is not None

    def run(self, x: torch.Tensor, rotations: Sequence[Rotation]) -> torch.Tensor:
        """As `Stack.run`."""
        flow = _Flow(x)
        for layer, rotation in zip(self.layers, rotations, strict=True):
            flow = layer.advance(flow, rotation)
        return flow.into(self._norm, self._kernels)[1]

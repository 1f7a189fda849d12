"""Decoder layers on a CPU: each in one call of the compiled operations, or all of them in one.

Owns where a layer's weights and KV lie in the terms of `native`, and the float32 that they want. What is a
layer, and that it agrees, is `layers`' and `stack`'s business. Must not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from seallmd.worker.attention import Answerer, Call, answering
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import native as c
from seallmd.worker.ops.layers import Layer, Parts, Rotation
from seallmd.worker.ops.modules import KnownNorm, struct_of
from seallmd.worker.ops.stack import Stack
from seallmd.worker.paged import PagedBatch


class NativeBackend:
    """As `layers.Backend`, on the CPU."""

    device = torch.device("cpu")
    dtype = torch.float32
    tolerance = 1e-4
    stack_tolerance = 1e-5

    def __init__(self, native: c.Native) -> None:
        self._native = native

    def takes(self, parts: Parts) -> bool:
        """All in one call: a gated unit must be inside."""
        return parts.unit is not None

    def called(self, parts: Parts) -> set[nn.Module]:  # noqa: ARG002
        """Nothing: hooks would be skipped."""
        return set()

    def answerer(self, kv: KvView, spans: Sequence[Span]) -> Answerer:
        """As `layers.Backend.answerer`."""
        return PagedBatch(kv, spans, self.device, self._native)

    def layer(self, module: nn.Module, parts: Parts, call: Call) -> Layer:
        """As `layers.Backend.layer`."""
        return FastLayer(module, parts, call, self._native)

    def stack(self, module: Any, layers: Sequence[Any], norm: KnownNorm) -> Stack:  # noqa: ARG002
        """As `stack.StackBackend.stack`; the last norm is its module's."""
        return FastStack(module, layers, self._native)


class FastLayer(Layer):
    """A layer in one call. Outside a step over the arena (see `PagedBatch.step`) the stock code runs."""

    def __init__(self, module: nn.Module, parts: Parts, call: Call, native: c.Native) -> None:
        super().__init__(module, call)
        self._parts, self._call, self._native = parts, call, native
        self._struct: c.Layer | None = None

    def bind(self, kv: KvView) -> None:
        """As `Layer.bind`."""
        parts, call, struct = self._parts, self._call, c.Layer()
        for name, value in parts._asdict().items():
            if isinstance(value, KnownNorm):
                setattr(struct, name, c.norm_struct(*value.bound))
        unit: Any = parts.unit
        linears = {"q": parts.q, "k": parts.k, "v": parts.v, "o": parts.o}
        for name, linear in (linears | {"gate": unit.gate, "up": unit.up, "down": unit.down}).items():
            setattr(struct, name, struct_of(linear))
        struct.attention = c.Attention(
            c.cache_struct(kv, self.layer),
            None,
            call.query.shape[1],
            call.window or 0,
            call.scale,
            call.softcap or 0.0,
        )
        struct.activation = c.ACTIVATION_CODES[unit.activation]
        self._struct = struct

    def unbind(self) -> None:
        """The weights are gone: nothing may follow the pointers."""
        self._struct = None

    @property
    def struct(self) -> c.Layer | None:
        """Where everything lies, while it is bound."""
        return self._struct

    def __call__(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """As the layer's own forward."""
        step = _step()
        if step is None or self._struct is None:
            return type(self.module).forward(self.module, hidden_states, *rest, **named)
        cos, sin = named["position_embeddings"]
        return self._native.layer(self._struct, step, cos, sin, hidden_states)


class FastStack(Stack):
    """All layers in one call: no Python runs between the embedding and the last norm."""

    def __init__(self, module: Any, layers: Sequence[Any], native: c.Native) -> None:
        super().__init__(module, layers)
        self._native = native
        self._structs: Any = None

    def bind(self) -> None:
        """As `Stack.bind`."""
        self._structs = (c.Layer * len(self.layers))(*(layer.struct for layer in self.layers))

    def unbind(self) -> None:
        """The weights are gone: nothing may follow the pointers."""
        self._structs = None

    def ready(self) -> bool:
        """As `Stack.ready`."""
        return self._structs is not None and _step() is not None

    def run(self, x: torch.Tensor, rotations: Sequence[Rotation]) -> torch.Tensor:
        """As `Stack.run`."""
        step: Any = _step()
        normed: torch.Tensor = self.module.norm(self._native.layers(self._structs, step, rotations, x))
        return normed


def _step() -> c.Step | None:
    """The step under way, if it is one over the arena."""
    batch = answering()
    return batch.step if isinstance(batch, PagedBatch) else None

"""All decoder layers of a model as one: from the embedding to the last norm without transformers' loop.

Owns the recognition: the model without its output layer has embeddings, rotations, layers that were all
recognised, and a norm, and these one after the other gave what the model's own forward gives. Whatever else
that may do shows there; the layers are then called one by one. How they are run is a `StackBackend`'s
business. Must not know requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Answerer
from seallmd.worker.ops.layers import (
    Backend,
    Layer,
    Rotation,
    find_layers,
    hooked,
    probe_kv,
    probe_spans,
    run_probe,
    spread_positions,
)
from seallmd.worker.ops.modules import KnownNorm, KnownNorms, close


class _Turn(NamedTuple):
    """A call of the rotary module: what it was given besides states and positions, and what it gave."""

    given: tuple[Any, ...]
    named: dict[str, Any]
    rotation: Rotation


class Stack(ABC):
    """The forward of a recognised model without its output layer. `bind` must follow the layers' own.

    layers: by the same backend.
    """

    def __init__(self, module: Any, layers: Sequence[Any]) -> None:
        self.module, self.layers = module, layers
        self._turns: list[_Turn] = []  # the different ones
        self._turn_of: list[int] = []  # by layer
        self._output: type[ModelOutput] = ModelOutput

    def bind(self) -> None:  # noqa: B027 - only where pointers are kept
        """Take down where the layers' weights and KV lie."""

    def unbind(self) -> None:  # noqa: B027
        """The weights are gone."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `run` can answer the forward pass under way."""

    @abstractmethod
    def run(self, x: torch.Tensor, rotations: Sequence[Rotation]) -> torch.Tensor:
        """Embeddings x [1, tokens, hidden] through all layers, each with its rotation, and the last norm."""

    def learn(self, turns: list[_Turn], seen: Sequence[Rotation], output: ModelOutput) -> bool:
        """Which rotation each layer gets, and what the module returns. False: it cannot be told.

        turns: calls of the rotary module. seen: what the layers got, in order. output: the module's own.
        """
        pointers = [turn.rotation[0].data_ptr() for turn in turns]
        if any(cos.data_ptr() not in pointers for cos, _ in seen) or list(output) != ["last_hidden_state"]:
            return False
        self._turns, self._output = turns, type(output)
        self._turn_of = [pointers.index(cos.data_ptr()) for cos, _ in seen]
        return len({turn.rotation[0].shape for turn in turns}) == 1

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As the module's own forward."""
        if given or named.get("inputs_embeds") is not None or not self.ready():
            return type(self.module).forward(self.module, *given, **named)
        x, positions = self.module.embed_tokens(named["input_ids"]), named["position_ids"]
        turned = [self.module.rotary_emb(x, positions, *turn.given, **turn.named) for turn in self._turns]
        return self._output(last_hidden_state=self.run(x, [turned[number] for number in self._turn_of]))


class StackBackend(Backend, Protocol):
    """A backend that runs whole stacks too. stack_tolerance: relative to their output's largest element."""

    stack_tolerance: float

    def stack(self, module: Any, layers: Sequence[Any], norm: KnownNorm) -> Stack:
        """To replace the forward of `module`. layers: its own, made by `layer`; norm: its last one."""


def install_layers(
    model: nn.Module, shapes: Sequence[LayerShape], context: int, norms: KnownNorms, backend: StackBackend
) -> tuple[list[Layer], Stack | None]:
    """Replace the forward of every layer that is recognised, and of what runs them if that is all it does.

    shapes: of every layer's KV. context: tokens of the longest request. Weights must be bound, modules
    installed.
    """
    layers = find_layers(model, shapes, context, norms, backend)
    for layer in layers:
        layer.module.forward = layer
    stack = _find_stack(model, layers, shapes, context, norms, backend)
    if stack is not None:
        stack.module.forward = stack
    return layers, stack


def _find_stack(
    model: nn.Module,
    layers: Sequence[Layer],
    shapes: Sequence[LayerShape],
    context: int,
    norms: KnownNorms,
    backend: StackBackend,
) -> Stack | None:
    """What runs all of `layers` at once, where that is all that the model does. They must be installed."""
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    modules = list(getattr(base, "layers", ()))
    if not modules or modules != [layer.module for layer in layers]:
        return None
    if [layer.layer for layer in layers] != list(range(len(shapes))):
        return None
    parts = [getattr(base, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
    if None in parts or base.norm not in norms or hooked(base.norm, *modules):
        return None
    kv = probe_kv(shapes, backend.dtype, backend.device)
    stack = backend.stack(base, layers, norms[base.norm])
    for layer in layers:
        layer.bind(kv)
    stack.bind()
    try:
        agrees = _agrees(stack, backend.answerer(kv, probe_spans()), spread_positions(context), backend)
        return stack if agrees else None
    finally:
        stack.unbind()
        for layer in layers:
            layer.unbind()


def _agrees(stack: Stack, answerer: Answerer, positions: Sequence[int], backend: StackBackend) -> bool:
    base: Any = stack.module
    turns: list[_Turn] = []
    seen: list[Rotation] = []

    def turned(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        others = {name: value for name, value in named.items() if name not in ("x", "position_ids")}
        turns.append(_Turn(given[2:], others, out))

    def looked(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["position_embeddings"])

    hooks = [base.rotary_emb.register_forward_hook(turned, with_kwargs=True)]
    hooks += [m.register_forward_pre_hook(looked, with_kwargs=True) for m in base.layers]
    try:
        expected = run_probe(base, answerer, backend.device, positions)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(base.layers) or not stack.learn(turns, seen, expected):
        return False
    base.forward = stack
    try:
        ours = run_probe(base, answerer, backend.device, positions).last_hidden_state
    finally:
        del base.forward
    return close(ours, expected.last_hidden_state, backend.stack_tolerance)

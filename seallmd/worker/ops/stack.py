"""All decoder layers of a model in one call: no Python runs between the embedding and the last norm.

Owns the recognition: the model without its output layer has embeddings, rotations, layers that are all
compiled, and a norm, and these one after the other gave what the model's own forward gives. Whatever else
that may do shows there; the layers are then called one by one. Must not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from seallmd.core.messages import LayerShape
from seallmd.worker.attention import answering
from seallmd.worker.ops import native as c
from seallmd.worker.ops.layers import FastLayer, probe_batch, probe_kv, run_probe
from seallmd.worker.ops.modules import FastNorm, close
from seallmd.worker.paged import PagedBatch


class _Turn(NamedTuple):
    """A call of the rotary module: what it was given besides states and positions, and what it gave."""

    given: tuple[Any, ...]
    named: dict[str, Any]
    rotation: c.Rotation


class FastStack:
    """The forward of a recognised model without its output layer. `bind` must follow the layers' own."""

    def __init__(self, module: nn.Module, layers: Sequence[FastLayer], native: c.Native) -> None:
        self.module, self._layers, self._native = module, layers, native
        self._turns: list[_Turn] = []  # the different ones
        self._turn_of: list[int] = []  # by layer
        self._structs: Any = None

    def bind(self) -> None:
        """Take down where the layers' weights and KV lie."""
        structs = [layer.struct for layer in self._layers if layer.struct is not None]
        self._structs = (c.Layer * len(self._layers))(*structs)

    def unbind(self) -> None:
        """The weights are gone: nothing may follow the pointers."""
        self._structs = None

    def turn_by(self, turns: list[_Turn], seen: Sequence[c.Rotation]) -> bool:
        """Learn which rotation each layer gets. seen: those they got, in order. False: it cannot be told."""
        pointers = [turn.rotation[0].data_ptr() for turn in turns]
        if any(cos.data_ptr() not in pointers for cos, _ in seen):
            return False
        self._turns = turns
        self._turn_of = [pointers.index(cos.data_ptr()) for cos, _ in seen]
        return len({turn.rotation[0].shape for turn in turns}) == 1

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As the module's own forward."""
        batch = answering()
        step = batch.step if isinstance(batch, PagedBatch) else None
        if step is None or self._structs is None or given or named.get("inputs_embeds") is not None:
            return type(self.module).forward(self.module, *given, **named)
        return BaseModelOutputWithPast(
            last_hidden_state=self._run(step, named["input_ids"], named["position_ids"])
        )

    def _run(self, step: c.Step, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        x = module.embed_tokens(ids)
        turned = [module.rotary_emb(x, positions, *turn.given, **turn.named) for turn in self._turns]
        rotations = [turned[number] for number in self._turn_of]
        normed: torch.Tensor = module.norm(self._native.layers(self._structs, step, rotations, x))
        return normed


def find_stack(
    model: nn.Module, layers: Sequence[FastLayer], shapes: Sequence[LayerShape], native: c.Native
) -> FastStack | None:
    """What runs all of `layers` at once, where that is all that the model does. They must be installed.

    shapes: of every layer's KV.
    """
    base: Any = getattr(model, getattr(model, "base_model_prefix", ""), None)
    modules = list(getattr(base, "layers", ()))
    if not modules or modules != [layer.module for layer in layers]:
        return None
    if [layer.layer for layer in layers] != list(range(len(shapes))):
        return None
    parts = [getattr(base, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
    if None in parts or not isinstance(base.norm.__dict__.get("forward"), FastNorm):
        return None
    kv, stack = probe_kv(shapes), FastStack(base, layers, native)
    for layer in layers:
        layer.bind(kv)
    stack.bind()
    try:
        return stack if _agrees(stack, probe_batch(kv, native)) else None
    finally:
        stack.unbind()
        for layer in layers:
            layer.unbind()


def _agrees(stack: FastStack, batch: PagedBatch) -> bool:
    base: Any = stack.module
    turns: list[_Turn] = []
    seen: list[c.Rotation] = []

    def turned(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        others = {name: value for name, value in named.items() if name not in ("x", "position_ids")}
        turns.append(_Turn(given[2:], others, out))

    def looked(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["position_embeddings"])

    hooks = [base.rotary_emb.register_forward_hook(turned, with_kwargs=True)]
    hooks += [m.register_forward_pre_hook(looked, with_kwargs=True) for m in base.layers]
    try:
        expected = run_probe(base, batch).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(base.layers) or not stack.turn_by(turns, seen):
        return False
    base.forward = stack
    try:
        ours = run_probe(base, batch).last_hidden_state
    finally:
        del base.forward
    return close(ours, expected)

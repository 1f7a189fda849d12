"""A model with the operations in it, from its skeleton to every new binding of its weights.

Owns the order: float32 activations for 16-bit weights if the model can do that, then modules, then layers,
then all layers at once.
Must not know messages, copies or requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import run_recorded
from seallmd.worker.kv import KvView
from seallmd.worker.ops.layers import Layer
from seallmd.worker.ops.modules import (
    FastBlocks,
    FastLinear,
    FastNorm,
    WideEmbedding,
    install,
    widen_embeddings,
)
from seallmd.worker.ops.native import Native
from seallmd.worker.ops.native_layers import FastLayer, FastStack, NativeBackend
from seallmd.worker.ops.stack import Stack, install_layers
from seallmd.worker.skeleton import build_skeleton

_KINDS: dict[type, str] = {
    FastStack: "stack of all layers",
    FastLayer: "decoder layers",
    FastNorm: "norms",
    FastLinear: "linear layers",
    FastBlocks: "int8 linear layers",
    WideEmbedding: "embeddings",
}


class FastModel:
    """What was replaced in a model. The first `bind` decides it, since that needs the real weights."""

    def __init__(self, model: PreTrainedModel, native: Native) -> None:
        self._model, self._native = model, native
        self.layers: list[Layer] | None = None
        self.stack: Stack | None = None

    def install(self, shapes: Sequence[LayerShape], context: int) -> None:
        """Replace what is recognised. Weights must be bound. context: tokens of the longest request."""
        with self._native.exactly():  # two ways to compute the same may round to different neighbours
            norms = install(self._model, self._native)
            backend = NativeBackend(self._native)
            self.layers, self.stack = install_layers(self._model, shapes, context, norms, backend)

    def bind(self, kv: KvView) -> None:
        """After every binding of the weights."""
        for layer in self.layers or ():
            layer.bind(kv)
        if self.stack is not None:
            self.stack.bind()

    def replaced(self) -> tuple[tuple[str, int], ...]:
        """(kind of module, how many of it were replaced); empty before `install`."""
        forwards = (module.__dict__.get("forward") for module in self._model.modules())
        found = Counter(type(forward) for forward in forwards)
        return tuple((name, found[kind]) for kind, name in _KINDS.items() if found[kind])

    def unbind(self) -> None:
        """Before the weights go."""
        if self.stack is not None:
            self.stack.unbind()
        for layer in self.layers or ():
            layer.unbind()


def wide_skeleton(config: PreTrainedConfig, stock: PreTrainedModel) -> PreTrainedModel:
    """`stock` with its 16-bit weights, but built for float32 arithmetic: buffers and constants in float32."""
    model = build_skeleton(config, torch.float32, torch.device("cpu"))
    dtypes = {name: tensor.dtype for name, tensor in stock.state_dict(keep_vars=True).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
    widen_embeddings(model)
    return model


def runs_wide(model: PreTrainedModel, native: Native) -> bool:
    """Whether `model`, a wide skeleton with bound weights, runs with float32 activations all through.

    Families with weights outside linear layers, norms and embeddings (experts, Conv1D) mostly do not.
    """
    install(model, native)
    try:
        calls, logits = run_recorded(model, tokens=3)
    except RuntimeError:  # two dtypes met in one operation
        return False
    return logits.dtype is torch.float32 and all(call.dtype is torch.float32 for call in calls)

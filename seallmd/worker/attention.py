"""The attention function that every model calls, and who answers it.

Owns the entry in transformers' attention registry and the recorder that learns a model's KV shape from its
calls. A process runs one forward pass at a time, so who answers is bound to the backend rather than passed
through the model: some families drop keyword arguments they do not know. Must not know requests or messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

NAME = "seallmd"


class Call(NamedTuple):
    """What one layer asks for. window: keys it may see, its own included; softcap: of the scores;
    sinks: one logit per query head that takes part in the softmax without a value."""

    layer: int
    query: torch.Tensor  # [1, query heads, tokens, key dim]
    key: torch.Tensor  # [1, KV heads, tokens, key dim]
    value: torch.Tensor  # [1, KV heads, tokens, value dim]
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    bidirectional: bool
    unknown: tuple[str, ...]  # tensors handed over under names that we would silently ignore


class Answerer(Protocol):
    """Computes the attention of one forward pass."""

    def attend(self, call: Call) -> torch.Tensor:
        """Returns [tokens, query heads, value dim]."""


class LayerCall(NamedTuple):
    """What the recorder keeps of a call."""

    layer: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None
    bidirectional: bool
    unknown: tuple[str, ...]
    dtype: torch.dtype  # of the query


class Recorder:
    """Answers with zeros and remembers what was asked; works on meta tensors too."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        heads, k_dim = call.key.shape[1], call.key.shape[3]
        v_dim = call.value.shape[3]
        self.calls.append(
            LayerCall(
                call.layer,
                heads,
                k_dim,
                v_dim,
                call.window,
                call.bidirectional,
                call.unknown,
                call.query.dtype,
            )
        )
        return call.query.new_zeros(call.query.shape[2], call.query.shape[1], v_dim)


# Tensors that models pass along for other backends and that change nothing here.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cos",
    "sin",
    "position_embeddings",
    "input_ids",
}


class _Backend:
    """The registered function."""

    answerer: Answerer | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,  # noqa: ARG002 - models in evaluation mode pass 0
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        if self.answerer is None:
            raise RuntimeError("a model ran outside a step")
        unknown = [k for k, v in others.items() if isinstance(v, torch.Tensor) and k not in _HARMLESS]
        if attention_mask is not None:
            unknown.append("attention_mask")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        call = Call(
            layer=module.layer_idx,
            query=query,
            key=key,
            value=value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window or None,
            softcap=softcap or None,
            sinks=s_aux,
            bidirectional=not causal,
            unknown=tuple(unknown),
        )
        return self.answerer.attend(call)[None], None


_backend = _Backend()
# Without a mask function of the same name transformers builds no mask, which is what we want.
AttentionInterface.register(NAME, _backend)


@contextmanager
def answered_by(answerer: Answerer) -> Iterator[None]:
    """Have `answerer` compute the attention of the forward pass inside the block."""
    _backend.answerer = answerer
    try:
        yield
    finally:
        _backend.answerer = None


def answering() -> Answerer | None:
    """Who computes the attention of the forward pass under way."""
    return _backend.answerer


def run_recorded(model: torch.nn.Module, tokens: int) -> tuple[list[LayerCall], torch.Tensor]:
    """One forward pass of `tokens` arbitrary tokens: its attention calls by layer, and the logits."""
    recorder = Recorder()
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    with torch.inference_mode(), answered_by(recorder):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return sorted(recorder.calls, key=lambda call: call.layer), logits

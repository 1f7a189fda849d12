"""Finds the decoder layers that can run as a whole: norm, attention, norm, MLP, each with its residual.

Owns the recognition, for every kind of device: a layer consists of exactly the parts of that form, and in a
forward pass with the weights at hand it gave what a `Layer` made of these parts gives on the same input.
Whatever else transformers' code may do (multipliers, clamps, other rotations, scales that begin at some
position) shows there, and the layer stays stock. What runs the parts is a `Backend`: `native_layers` on a
CPU, `gpu_layers` on a GPU. Must not know requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Answerer, Call, answered_by
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops.modules import KnownNorm, KnownNorms, recognise_activation
from seallmd.worker.paged import PagedBatch
from seallmd.worker.quantised import is_linear, shape_of

PROBE_TOKENS = 7
_PROBE_BLOCK_TOKENS = 4  # so that the probe crosses from one block to the next

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [..., tokens, width]


class Unit(NamedTuple):
    """A gated linear unit: down(activation(gate) * up)."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: str


class Parts(NamedTuple):
    """The modules of a layer. unit: None where the MLP is something else."""

    before_attention: KnownNorm
    q_norm: KnownNorm | None
    k_norm: KnownNorm | None
    after_attention: KnownNorm | None
    before_mlp: KnownNorm
    after_mlp: KnownNorm | None
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    mlp: nn.Module
    unit: Unit | None


class Layer(ABC):
    """The forward of a recognised layer. `bind` must follow every binding of its weights."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module, self.layer = module, call.layer

    def bind(self, kv: KvView) -> None:  # noqa: B027 - only where pointers are kept
        """Take down where weights and KV lie."""

    def unbind(self) -> None:  # noqa: B027
        """The weights are gone."""

    @abstractmethod
    def __call__(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """As the layer's own forward."""


class Backend(Protocol):
    """What runs recognised layers on one kind of device. dtype: of the activations that it takes.

    tolerance: for a token's whole output, relative to its norm; sums run in another order.
    """

    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def takes(self, parts: Parts) -> bool:
        """Whether it can run such a layer at all."""

    def called(self, parts: Parts) -> set[nn.Module]:
        """What it calls as modules, so that their hooks run: those of tensor parallelism."""

    def answerer(self, kv: KvView, spans: Sequence[Span]) -> Answerer:
        """Attention of a step by its own operations."""

    def layer(self, module: nn.Module, parts: Parts, call: Call) -> Layer:
        """To replace the forward of `module`. call: what its attention was asked."""


class _Seen(NamedTuple):
    """What a stock layer was given, what it asked of attention, what it gave."""

    x: torch.Tensor
    rotation: Rotation
    call: Call
    out: torch.Tensor


def find_layers(
    model: nn.Module, shapes: Sequence[LayerShape], context: int, norms: KnownNorms, backend: Backend
) -> list[Layer]:
    """The layers of `model` that `backend` can run. Weights must be bound, modules installed.

    shapes: of every layer's KV. context: tokens of the longest request.
    """
    found = {m: parts for m in model.modules() if (parts := _parts(m, norms)) is not None}
    modules = {
        m: p for m, p in found.items() if backend.takes(p) and hooked(*m.modules()) <= backend.called(p)
    }
    if not modules:
        return []
    kv = probe_kv(shapes, backend.dtype, backend.device)
    layers = []
    for module, seen in _watch(model, modules, kv, context, backend.device).items():
        if _suits(seen, backend.dtype) and _fits(modules[module], seen):
            layer = backend.layer(module, modules[module], seen.call)
            if _agrees(layer, seen, kv, backend):
                layers.append(layer)
    return layers


def hooked(*modules: nn.Module) -> set[nn.Module]:
    """Those with hooks: tensor parallelism's are part of what they compute."""
    return {module for module in modules if module._forward_hooks or module._forward_pre_hooks}


def _parts(layer: nn.Module, norms: KnownNorms) -> Parts | None:
    """The parts of a module that has the form of a decoder layer, and nothing besides."""
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None:
        return None
    sandwich = "pre_feedforward_layernorm" in layer._modules  # Gemma 2 and 3: norms behind both halves
    names = {
        "before_attention": (layer, "input_layernorm"),
        "after_attention": (layer, "post_attention_layernorm" if sandwich else ""),
        "before_mlp": (layer, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        "after_mlp": (layer, "post_feedforward_layernorm"),
        "q_norm": (attention, "q_norm"),
        "k_norm": (attention, "k_norm"),
    }
    present = {name: owner._modules.get(leaf) for name, (owner, leaf) in names.items()}
    known = {name: norms.get(module) for name, module in present.items() if module is not None}
    linears = {name: attention._modules.get(f"{name}_proj") for name in "qkvo"}
    if not all(map(is_linear, linears.values())) or None in known.values():
        return None
    if "before_attention" not in known or "before_mlp" not in known:
        return None
    own = [*linears.values(), mlp, *(module for module in present.values() if module is not None)]
    owned = {id(p) for module in own for p in module.parameters()}
    if {id(p) for p in layer.parameters()} != owned:
        return None
    optional = dict.fromkeys(("q_norm", "k_norm", "after_attention", "after_mlp"))
    return Parts(**optional | known, **linears, mlp=mlp, unit=_unit(mlp))


def _unit(mlp: nn.Module) -> Unit | None:
    linears = [mlp._modules.get(f"{name}_proj") for name in ("gate", "up", "down")]
    activation = recognise_activation(getattr(mlp, "act_fn", None))
    if activation is None or not all(map(is_linear, linears)):
        return None
    if {id(p) for p in mlp.parameters()} != {id(p) for linear in linears for p in linear.parameters()}:
        return None
    gate, up, down = linears
    return Unit(gate, up, down, activation)


def probe_kv(
    shapes: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = PROBE_TOKENS,
    block_tokens: int = _PROBE_BLOCK_TOKENS,
) -> KvView:
    """A small arena of our own, of zeros; in float32 nothing is lost by storing."""
    token_bytes = dtype.itemsize * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in shapes)
    block_bytes = token_bytes * block_tokens
    blocks = -(-tokens // block_tokens)
    arena = torch.zeros(blocks * block_bytes, dtype=torch.uint8, device=device)
    return KvView(arena, block_bytes, shapes, dtype)


def probe_spans() -> list[Span]:
    """The step of `run_probe`."""
    table = list(range(-(-PROBE_TOKENS // _PROBE_BLOCK_TOKENS)))[::-1]
    return [Span(0, PROBE_TOKENS, PROBE_TOKENS, table)]


class _Witness:
    """An answerer that remembers the last call."""

    def __init__(self, answerer: PagedBatch) -> None:
        self._answerer = answerer
        self.call: Call | None = None

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        self.call = call
        return self._answerer.attend(call)


def _watch(
    model: nn.Module, modules: dict[nn.Module, Parts], kv: KvView, context: int, device: torch.device
) -> dict[nn.Module, _Seen]:
    """Run a few tokens through the stock layers, and see what each of `modules` did."""
    witness, seen = _Witness(PagedBatch(kv, probe_spans(), device)), {}

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        rotation, call = named.get("position_embeddings"), witness.call
        if len(given) == 1 and isinstance(out, torch.Tensor) and rotation is not None and call is not None:
            seen[module] = _Seen(given[0].clone(), rotation, call, out.clone())
        witness.call = None

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    try:
        run_probe(model, witness, device, spread_positions(context))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def spread_positions(context: int) -> Sequence[int]:
    """Of the tokens of `probe_spans`, from the first position that a request may have to the last: some
    families (Ministral 3) scale queries from thousands of tokens on. Attention goes by the span."""
    return [n * (context - 1) // (PROBE_TOKENS - 1) for n in range(PROBE_TOKENS)]


def run_probe(model: nn.Module, answerer: Answerer, device: torch.device, positions: Sequence[int]) -> Any:
    """A forward pass of a few arbitrary tokens at these positions; whatever it gives."""
    # Not the rows of its table: those of a tensor-parallel rank are fewer, and hold none of the lowest ids.
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, len(positions) + 1, device=device)[None] * 31 % vocabulary
    at = torch.tensor([positions], device=device)
    with torch.inference_mode(), answered_by(answerer):
        return model(input_ids=ids, position_ids=at, use_cache=False)


def _suits(seen: _Seen, dtype: torch.dtype) -> bool:
    """Whether a layer can take these inputs at all."""
    call, (cos, sin) = seen.call, seen.rotation
    return (
        all(t.dtype is dtype and t.is_contiguous() for t in (seen.x, seen.out, cos, sin))
        and cos.shape == sin.shape
        and cos.numel() == PROBE_TOKENS * cos.shape[-1]
        and cos.shape[-1] <= call.query.shape[-1]
        and cos.shape[-1] % 2 == 0
        and call.sinks is None
    )


def _fits(parts: Parts, seen: _Seen) -> bool:
    """Whether all weights have the shapes that attention and input ask for."""
    call, hidden = seen.call, seen.x.shape[-1]
    kv_heads, k_dim, v_dim = call.key.shape[1], call.key.shape[3], call.value.shape[3]
    heads = call.query.shape[1]
    expected = {
        parts.q: (heads * k_dim, hidden),
        parts.k: (kv_heads * k_dim, hidden),
        parts.v: (kv_heads * v_dim, hidden),
        parts.o: (hidden, heads * v_dim),
    }
    if parts.unit is not None:
        gate, up, down, _ = parts.unit
        inner = shape_of(gate)[0]
        expected |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    if any(shape_of(linear) != shape for linear, shape in expected.items()):
        return False
    wide = (parts.before_attention, parts.after_attention, parts.before_mlp, parts.after_mlp)
    return all(norm is None or norm.bound.weight.numel() == hidden for norm in wide) and all(
        norm is None or norm.bound.weight.numel() == k_dim for norm in (parts.q_norm, parts.k_norm)
    )


def _agrees(layer: Layer, seen: _Seen, kv: KvView, backend: Backend) -> bool:
    layer.bind(kv)
    with torch.inference_mode(), answered_by(backend.answerer(kv, probe_spans())):
        ours = layer(seen.x, position_embeddings=seen.rotation)
    layer.unbind()
    error, size = (ours.float() - seen.out.float()).norm(dim=-1), seen.out.float().norm(dim=-1)
    return bool((error <= backend.tolerance * size).all())

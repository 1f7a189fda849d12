"""Whole decoder layers in one call: norm, attention, norm, gated MLP, each with its residual.

Owns the recognition: a layer consists of exactly the parts of that form, and in a forward pass with the
weights at hand it gave what the compiled layer gives on the same input. Whatever else transformers' code
may do (multipliers, clamps, other rotations) shows there, and the layer stays stock. Must not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from seallmd.core.messages import LayerShape
from seallmd.worker.attention import Answerer, Call, answered_by, answering
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import native as c
from seallmd.worker.ops.modules import FastNorm, recognise_activation
from seallmd.worker.paged import PagedBatch

_PROBE_TOKENS = 7
_PROBE_BLOCK_TOKENS = 4  # so that the probe crosses from one block to the next
# Of a token's whole output: sums run in another order, and a layer is long.
_TOLERANCE = 1e-4


class Parts(NamedTuple):
    """The modules of a layer; None for a norm that it has not."""

    norms: dict[str, nn.Module | None]  # by their names in native.Layer
    projections: dict[str, nn.Linear]
    activation: str


class _Seen(NamedTuple):
    """What a stock layer was given, what it asked of attention, what it gave."""

    x: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor]
    call: Call
    out: torch.Tensor


class FastLayer:
    """The forward of a recognised layer. `bind` must follow every binding of its weights.

    Outside a step over the arena (see `PagedBatch.step`) the stock code runs.
    """

    def __init__(self, module: nn.Module, parts: Parts, call: Call, native: c.Native) -> None:
        self.layer = call.layer
        self.module, self._parts, self._call, self._native = module, parts, call, native
        self._struct: c.Layer | None = None

    def bind(self, kv: KvView) -> None:
        """Take down where weights and KV lie."""
        call, struct = self._call, c.Layer()
        for name, norm in self._parts.norms.items():
            if norm is not None:
                fast = norm.__dict__["forward"]
                setattr(struct, name, c.norm_struct(norm._parameters["weight"], fast.eps, fast.offset))
        for name, linear in self._parts.projections.items():
            setattr(struct, name, c.linear_struct(linear.weight, linear.bias))
        struct.attention = c.Attention(
            c.cache_struct(kv, self.layer),
            None,
            call.query.shape[1],
            call.window or 0,
            call.scale,
            call.softcap or 0.0,
        )
        struct.activation = c.ACTIVATION_CODES[self._parts.activation]
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
        batch = answering()
        step = batch.step if isinstance(batch, PagedBatch) else None
        if step is None or self._struct is None:
            return type(self.module).forward(self.module, hidden_states, *rest, **named)
        cos, sin = named["position_embeddings"]
        return self._native.layer(self._struct, step, cos, sin, hidden_states)


def find_layers(model: nn.Module, shapes: Sequence[LayerShape], native: c.Native) -> list[FastLayer]:
    """The layers of `model` that can run in one call. Weights must be bound, norms installed.

    shapes: of every layer's KV.
    """
    modules = {m: parts for m in model.modules() if (parts := _parts(m)) is not None}
    if not modules:
        return []
    kv = probe_kv(shapes)
    found = []
    for module, seen in _watch(model, modules, kv).items():
        fast = FastLayer(module, modules[module], seen.call, native)
        if _suits(seen) and _agrees(fast, seen, kv, native):
            found.append(fast)
    return found


def _parts(layer: nn.Module) -> Parts | None:
    """The parts of a module that has the form of a decoder layer, and nothing besides."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    get = layer._modules.get
    if attention is None or mlp is None:
        return None
    sandwich = "pre_feedforward_layernorm" in layer._modules  # Gemma 2 and 3: norms behind both halves
    norms = {
        "before_attention": get("input_layernorm"),
        "after_attention": get("post_attention_layernorm") if sandwich else None,
        "before_mlp": get("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        "after_mlp": get("post_feedforward_layernorm"),
        "q_norm": getattr(attention, "q_norm", None),
        "k_norm": getattr(attention, "k_norm", None),
    }
    projections = {name: getattr(attention, f"{name}_proj", None) for name in "qkvo"}
    projections |= {name: getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")}
    activation = recognise_activation(getattr(mlp, "act_fn", None))
    if activation is None or any(type(linear) is not nn.Linear for linear in projections.values()):
        return None
    if norms["before_attention"] is None or norms["before_mlp"] is None:
        return None
    present = [norm for norm in norms.values() if norm is not None]
    if any(not isinstance(norm.__dict__.get("forward"), FastNorm) for norm in present):
        return None
    owned = {id(p) for module in (*present, *projections.values()) for p in module.parameters()}
    if {id(p) for p in layer.parameters()} != owned:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()):  # tensor parallelism
        return None
    return Parts(norms, projections, activation)  # type: ignore[arg-type]


def probe_kv(
    shapes: Sequence[LayerShape],
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    tokens: int = _PROBE_TOKENS,
) -> KvView:
    """A small arena of our own; in float32 nothing is lost by storing."""
    token_bytes = dtype.itemsize * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in shapes)
    block_bytes = token_bytes * _PROBE_BLOCK_TOKENS
    blocks = -(-tokens // _PROBE_BLOCK_TOKENS)
    arena = torch.zeros(blocks * block_bytes, dtype=torch.uint8, device=device)
    return KvView(arena, block_bytes, shapes, dtype)


def probe_batch(kv: KvView, native: c.Native | None) -> PagedBatch:
    """The step of `run_probe`."""
    table = list(range(-(-_PROBE_TOKENS // _PROBE_BLOCK_TOKENS)))[::-1]
    return PagedBatch(kv, [Span(0, _PROBE_TOKENS, _PROBE_TOKENS, table)], torch.device("cpu"), native)


class _Witness:
    """An answerer that remembers the last call."""

    def __init__(self, answerer: PagedBatch) -> None:
        self._answerer = answerer
        self.call: Call | None = None

    def attend(self, call: Call) -> torch.Tensor:
        """As `Answerer.attend`."""
        self.call = call
        return self._answerer.attend(call)


def _watch(model: nn.Module, modules: dict[nn.Module, Parts], kv: KvView) -> dict[nn.Module, _Seen]:
    """Run a few tokens through the stock layers, and see what each of `modules` did."""
    witness, seen = _Witness(probe_batch(kv, None)), {}

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        rotation, call = named.get("position_embeddings"), witness.call
        if len(given) == 1 and isinstance(out, torch.Tensor) and rotation is not None and call is not None:
            seen[module] = _Seen(given[0].clone(), rotation, call, out.clone())
        witness.call = None

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in modules]
    try:
        run_probe(model, witness)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def run_probe(model: nn.Module, answerer: Answerer) -> Any:
    """A forward pass of a few tokens; whatever it gives."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_PROBE_TOKENS)[None] * 31 % vocabulary
    with torch.inference_mode(), answered_by(answerer):
        return model(input_ids=ids, position_ids=torch.arange(_PROBE_TOKENS)[None], use_cache=False)


def _suits(seen: _Seen) -> bool:
    """Whether the compiled layer can take these inputs at all."""
    call, (cos, sin) = seen.call, seen.rotation
    tensors = (seen.x, seen.out, cos, sin)
    return (
        all(t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
        and cos.shape == sin.shape
        and cos.numel() == _PROBE_TOKENS * cos.shape[-1]
        and cos.shape[-1] <= call.query.shape[-1]
        and cos.shape[-1] % 2 == 0
        and call.sinks is None
    )


def _agrees(fast: FastLayer, seen: _Seen, kv: KvView, native: c.Native) -> bool:
    parts, call = fast._parts, seen.call
    kv_heads, k_dim, v_dim = call.key.shape[1], call.key.shape[3], call.value.shape[3]
    heads, hidden, inner = call.query.shape[1], seen.x.shape[-1], parts.projections["gate"].weight.shape[0]
    expected = {
        "q": (heads * k_dim, hidden),
        "k": (kv_heads * k_dim, hidden),
        "v": (kv_heads * v_dim, hidden),
        "o": (hidden, heads * v_dim),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if any(parts.projections[name].weight.shape != shape for name, shape in expected.items()):
        return False
    for name, norm in parts.norms.items():
        if norm is not None and norm.weight.numel() != (k_dim if name in ("q_norm", "k_norm") else hidden):
            return False
    fast.bind(kv)
    with torch.inference_mode(), answered_by(probe_batch(kv, native)):
        ours = fast(seen.x, position_embeddings=seen.rotation)
    fast.unbind()
    error, size = (ours - seen.out).norm(dim=-1), seen.out.norm(dim=-1)
    return bool((error <= _TOLERANCE * size).all())

"""The compiled operations as Python functions.

Owns the C structures (`cpp/types.h`, field for field) and the calls. Tensors come in checked: a pointer
carries neither shape nor dtype. Must not know modules or requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import reference
from seallmd.worker.quantised import Blocks

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_IN_BLOCKS = 3  # the code of weights that are
ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1}


class Linear(Structure):
    """A weight matrix [n][k], of contiguous rows or in blocks with scales; with or without a bias."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("dtype", c_int32),
        ("bias_dtype", c_int32),
    )


class Norm(Structure):
    """RMSNorm: x / rms(x) * (offset + weight); all zeros where there is none."""

    _fields_ = (
        ("weight", c_void_p),
        ("n", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
        ("offset", c_float),
    )


class Cache(Structure):
    """K and V of one layer in the arena."""

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("block_stride", c_int64),
        ("kv_heads", c_int32),
        ("k_dim", c_int32),
        ("v_dim", c_int32),
        ("page_tokens", c_int32),
        ("page_blocks", c_int32),
        ("block_of_page", c_int32),
        ("dtype", c_int32),
        ("pad", c_int32),
    )


class Attention(Structure):
    """Attention of one layer. window and softcap: 0 for none."""

    _fields_ = (
        ("cache", Cache),
        ("sinks", c_void_p),
        ("heads", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class _Span(Structure):
    _fields_ = (("first", c_int32), ("tokens", c_int32), ("context", c_int32), ("table", c_int32))


class _Step(Structure):
    _fields_ = (
        ("spans", c_void_p),
        ("tables", c_void_p),
        ("n_spans", c_int32),
        ("tokens", c_int32),
    )


class Layer(Structure):
    """A decoder layer: norm, attention, norm, gated MLP, each with its residual (see `layers`)."""

    _fields_ = (
        ("before_attention", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("after_attention", Norm),
        ("before_mlp", Norm),
        ("after_mlp", Norm),
        ("q", Linear),
        ("k", Linear),
        ("v", Linear),
        ("o", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
        ("attention", Attention),
        ("activation", c_int32),
        ("pad", c_int32),
    )


Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [..., tokens, width]

_CHECKED = (Linear, Norm, Cache, Attention, _Span, _Step, Layer)


class Step:
    """Where the packed tokens of one step belong; shared by all layers."""

    def __init__(self, spans: Sequence[Span]) -> None:
        ours, tokens = (_Span * len(spans))(), 0
        tables: list[int] = []
        for at, span in enumerate(spans):
            ours[at] = _Span(span.first, span.tokens, span.context, len(tables))
            tables += span.table
            tokens += span.tokens
        # Everything pointed to must live as long as the pointers.
        self._kept = (ours, torch.tensor(tables, dtype=torch.int32))
        self.tokens = tokens
        self.struct = _Step(ctypes.addressof(ours), self._kept[1].data_ptr(), len(spans), tokens)


def linear_struct(weight: torch.Tensor | Blocks, bias: torch.Tensor | None) -> Linear:
    """weight [n, k], contiguous rows or in blocks; bias [n] of any float dtype."""
    scales, code = None, _IN_BLOCKS
    if isinstance(weight, Blocks):
        weight, scale, n, k = weight
        scales = scale.data_ptr()
    else:
        (n, k), code = weight.shape, DTYPE_CODES[weight.dtype]
    if not weight.is_contiguous():
        raise ValueError("weights must be contiguous")
    added = (None, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])
    return Linear(weight.data_ptr(), scales, added[0], n, k, code, added[1])


def norm_struct(weight: torch.Tensor, eps: float, offset: float) -> Norm:
    """weight [n]."""
    return Norm(weight.data_ptr(), weight.numel(), DTYPE_CODES[weight.dtype], eps, offset)


def cache_struct(kv: KvView, layer: int) -> Cache:
    """Where a layer's K and V lie."""
    key, value = kv.views(layer)
    _, tokens, heads, k_dim = key.shape
    return Cache(
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0),
        heads,
        k_dim,
        value.shape[-1],
        tokens,
        kv.page.blocks,
        kv.block_of_page(layer),
        DTYPE_CODES[key.dtype],
    )


class Native:
    """The loaded library, with as many threads as torch has now.

    Activations are float32, contiguous, on the CPU. What a structure points to must outlive the call. Calls
    come from one thread. Raises OSError if the library is unusable. vector_floats: width of its vectors.
    set_threads: how many share the work from here on, the caller's included. rounds: whether activations that
    meet weights, keys or values of bfloat16 are rounded to it (see `exactly`); products are summed in float32
    either way. Those that meet weights in blocks are rounded to groups of 8 bits on every processor.
    """

    def __init__(self, library: Path) -> None:
        lib = ctypes.CDLL(str(library))
        pointer, size = c_void_p, c_int32
        self._linear = _declare(lib.seallmd_linear, POINTER(Linear), pointer, size, pointer)
        self._norm = _declare(lib.seallmd_norm, POINTER(Norm), pointer, c_int64, pointer)
        self._gated = _declare(lib.seallmd_gated, pointer, pointer, c_int64, size)
        self._rotate = _declare(lib.seallmd_rotate, pointer, size, size, size, pointer, pointer, size)
        self._attention = _declare(
            lib.seallmd_attention, POINTER(Attention), POINTER(_Step), pointer, pointer, pointer, pointer
        )
        self._layer = _declare(
            lib.seallmd_layer, POINTER(Layer), POINTER(_Step), pointer, pointer, size, pointer, pointer
        )
        self._layers = _declare(
            lib.seallmd_layers, pointer, size, POINTER(_Step), pointer, pointer, size, pointer, pointer
        )
        self._argmax = _declare(lib.seallmd_argmax, pointer, c_int64, size, pointer)
        self._copy = _declare(lib.seallmd_copy, pointer, pointer, c_int64)
        sizes = (c_int32 * len(_CHECKED))()
        lib.seallmd_sizes(sizes)
        if list(sizes) != [ctypes.sizeof(kind) for kind in _CHECKED]:
            raise OSError("the compiled operations have another layout of their structures")
        self.set_threads: Callable[[int], None] = _declare(lib.seallmd_set_threads, c_int32)
        self.set_threads(torch.get_num_threads())
        self.vector_floats = int(lib.seallmd_vector_floats())
        self._set_rounding: Callable[[bool], int] = lib.seallmd_set_rounding
        self.rounds = bool(self._set_rounding(True))
        self._examine()

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Round no activations inside the block, on any processor: for comparisons."""
        self._set_rounding(False)
        try:
            yield
        finally:
            self._set_rounding(True)

    def _examine(self) -> None:
        """A compiler or emulator that gets vectors wrong must not get to serve anyone."""
        for dtype in DTYPE_CODES:
            x = torch.linspace(-1, 1, 5 * 70).view(5, 70).to(dtype).float()
            weight = torch.linspace(-2, 1, 9 * 70).view(9, 70).to(dtype)
            ours = self.linear(x, linear_struct(weight, None))
            if not torch.allclose(ours, reference.linear(x, weight, None), atol=1e-4):
                raise OSError("the compiled operations compute something else")
        blocks = Blocks.empty(9, 70)
        blocks.fill(weight)
        with self.exactly():
            if not torch.allclose(
                self.linear(x, linear_struct(blocks, None)), blocks.linear(x, None), atol=1e-4
            ):
                raise OSError("the compiled operations compute something else of 8-bit weights")

    def linear(self, x: torch.Tensor, weights: Linear) -> torch.Tensor:
        """x [..., k] -> [..., n]; x is rounded to what the weights are, to bfloat16 if `rounds`."""
        out = x.new_empty(*x.shape[:-1], weights.n)
        self._linear(byref(weights), x.data_ptr(), x.numel() // weights.k, out.data_ptr())
        return out

    def norm(self, x: torch.Tensor, weights: Norm) -> torch.Tensor:
        """x [..., n]."""
        out = torch.empty_like(x)
        self._norm(byref(weights), x.data_ptr(), x.numel() // weights.n, out.data_ptr())
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up."""
        out = gate.clone()
        self._gated(out.data_ptr(), up.data_ptr(), out.numel(), ACTIVATION_CODES[activation])
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [tokens, heads, dim]; cos and sin [tokens, width], width at most dim."""
        out = x.clone()
        self._rotate(out.data_ptr(), *x.shape, cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
        return out

    def attention(
        self, what: Attention, step: Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """query [tokens, heads, k_dim], key and value [tokens, kv_heads, dim] -> [tokens, heads, v_dim].

        Writes key and value to the arena first.
        """
        out = query.new_empty(*query.shape[:2], what.cache.v_dim)
        self._attention(
            byref(what),
            byref(step.struct),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
        )
        return out

    def layer(
        self, layer: Layer, step: Step, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """x [..., hidden] of the step's tokens; cos and sin [..., tokens, width]."""
        out = torch.empty_like(x)
        self._layer(
            layer,
            step.struct,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[-1],
            x.data_ptr(),
            out.data_ptr(),
        )
        return out

    def layers(
        self, layers: Sequence[Layer], step: Step, rotations: Sequence[Rotation], x: torch.Tensor
    ) -> torch.Tensor:
        """All of `layers` one after the other, each with its rotation; otherwise as `layer`.

        layers: a ctypes array of them. The rotations have one width.
        """
        count, out = len(rotations), torch.empty_like(x)
        cos = (c_void_p * count)(*(rotation[0].data_ptr() for rotation in rotations))
        sin = (c_void_p * count)(*(rotation[1].data_ptr() for rotation in rotations))
        width = rotations[0][0].shape[-1]
        self._layers(layers, count, byref(step.struct), cos, sin, width, x.data_ptr(), out.data_ptr())
        return out

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As `target.copy_(source)`, past the caches. Both contiguous, of one size and dtype, apart."""
        if target.nbytes != source.nbytes or not (target.is_contiguous() and source.is_contiguous()):
            raise ValueError("only what lies in one piece can be copied like this")
        self._copy(target.data_ptr(), source.data_ptr(), source.nbytes)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """Where each row is largest, the lowest index of equals. x [rows, n] float32 -> int64 [rows]."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], dtype=torch.long)
        self._argmax(x.data_ptr(), *x.shape, out.data_ptr())
        return out


def _declare(function: Any, *arguments: Any) -> Any:
    function.argtypes = arguments
    function.restype = None
    return function

"""The compiled operations: each against its reference, and when they may stand in for a model's own code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seallmd.core import messages as msg
from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import modules, reference
from seallmd.worker.ops.native import Native, linear_struct, norm_struct
from seallmd.worker.paged import PagedBatch
from seallmd.worker.quantised import Blocks
from tests.worker.helpers import FAMILIES, GREEDY, Rig, Talk, plain, run_step, save_tiny

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, bias: bool, native: Native) -> None:
    """Any number of rows, outputs and inputs, none of them a multiple of anything."""
    rng = random.Random(3)
    for n, k in [(1, 1), (3, 5), (4, 16), (9, 37), (130, 64), (257, 100), (64, 576)]:
        weight, b = noise(n, k).to(dtype), noise(n, seed=1).to(dtype) if bias else None
        for m in {1, 2, 3, 5, 7, 13, rng.randint(14, 40)}:
            x = noise(1, m, k, seed=m).to(dtype).float()  # so that rounding it changes nothing
            ours = native.linear(x, linear_struct(weight, b))
            torch.testing.assert_close(ours, reference.linear(x, weight, b), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_nothing(dtype: torch.dtype, native: Native) -> None:
    """No rows, no harm: a step whose rows are all pieces of prompts asks for no logits."""
    weight = noise(3, 8).to(dtype)
    assert native.linear(torch.empty(0, 8), linear_struct(weight, None)).shape == (0, 3)
    module = nn.Linear(8, 3, bias=False, dtype=dtype)
    out = modules.FastLinear(module, native)(torch.empty(1, 0, 8))
    assert (out.shape, out.dtype) == ((1, 0, 3), torch.float32)


def test_linear_of_very_many_rows(native: Native) -> None:
    """A step of as many tokens as `step_tokens` may allow: rows times tiles are more than 31 bits hold, and
    what wrapped around was an address outside the activations."""
    x, weight = noise(120_000, 8), noise(4, 8, seed=1)
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(native.linear(x, linear_struct(weight, None)), expected)
    blocks = Blocks.empty(*weight.shape)
    blocks.fill(weight)
    few = native.linear(x[-6:].contiguous(), linear_struct(blocks, None))
    assert torch.equal(native.linear(x, linear_struct(blocks, None))[-6:], few)


def test_copy(native: Native) -> None:
    """Any length, from and to any place; nothing beside it is touched."""
    rng = random.Random(5)
    source = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for length in [0, 1, 63, 64, 65, *(rng.randint(0, 1 << 15) for _ in range(40))]:
        at, to = rng.randint(0, 1 << 15), rng.randint(0, 1 << 15)
        target = torch.full_like(source, 7)
        expected = target.clone()
        expected[to : to + length] = source[at : at + length]
        native.copy(target[to : to + length], source[at : at + length])
        assert torch.equal(target, expected)
    with pytest.raises(ValueError, match="one piece"):
        native.copy(target[:4], source[:8:2])


def test_sixteen_bit_weights_are_exact(native: Native) -> None:
    """16-bit weights give bit for bit what the same numbers give as float32: nothing is rounded."""
    for dtype in (torch.float16, torch.bfloat16):
        weight, x = noise(70, 99).to(dtype), noise(11, 99, seed=1)
        wide = weight.float()
        with native.exactly():
            ours, expected = (native.linear(x, linear_struct(w, None)) for w in (weight, wide))
        assert torch.equal(ours, expected)


def test_bfloat16_products(native: Native) -> None:
    """Where the processor multiplies bfloat16, activations are rounded to it, and nothing else is."""
    weight, x = noise(70, 1099).to(torch.bfloat16), noise(11, 1099, seed=1)
    ours, rounded = (
        native.linear(x, linear_struct(weight, None)),
        x.bfloat16().float() if native.rounds else x,
    )
    torch.testing.assert_close(ours, reference.linear(rounded, weight, None), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_their_batch(dtype: torch.dtype, native: Native) -> None:
    """A row's sums run in one order whoever is beside it, so what a request draws cannot hang on others."""
    weight, x = noise(67, 83).to(dtype), noise(23, 83, seed=1)
    struct = linear_struct(weight, None)
    together = native.linear(x, struct)
    assert torch.equal(together, torch.stack([native.linear(row, struct) for row in x]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, native: Native) -> None:
    """Both kinds of RMSNorm, whole vectors and the rest of one."""
    for n in (1, 8, 33, 576):
        for offset in (0.0, 1.0):
            weight, x = noise(n).to(dtype), noise(5, 2, n, seed=2)
            ours = native.norm(x, norm_struct(weight, 1e-6, offset))
            torch.testing.assert_close(ours, reference.norm(x, weight, 1e-6, offset), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated(activation: str, native: Native) -> None:
    """The activations and their ends, where a careless exponential overflows."""
    gate, up = torch.cat([noise(77) * 4, torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])]), noise(82, seed=1)
    ours = native.gated(gate, up, activation)
    torch.testing.assert_close(ours, reference.gated(gate, up, activation), atol=1e-6, rtol=1e-5)


def test_rotate(native: Native) -> None:
    """Whole heads and a part of them."""
    for dim, width in [(64, 64), (20, 8), (6, 2)]:
        x, angle = noise(7, 3, dim), noise(7, width // 2, seed=1)
        cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
        torch.testing.assert_close(
            native.rotate(x, cos, sin), reference.rotate(x, cos, sin), atol=1e-6, rtol=0
        )


def test_argmax(native: Native) -> None:
    """The first of equals, as torch has it; infinities, and a row of NaN, which has no largest element."""
    for n in (1, 16, 17, 333):
        x = noise(9, n).mul(4).round()
        x[3] = float("-inf")
        x[4, n // 2] = float("inf")
        expected = x.argmax(-1)
        x[7] = float("nan")
        ours = native.argmax(x)
        assert 0 <= ours[7] < n
        expected[7] = ours[7]
        assert torch.equal(ours, expected)


# ---------------------------------------------------------------------------------------- attention


class Scene:
    """An arena with the KV of a few requests of one layer, and the packed rows of their next step."""

    def __init__(
        self,
        shape: LayerShape,
        heads: int,
        dtype: torch.dtype,
        block_tokens: int,
        seed: int,
        lengths: list[tuple[int, int]] | None = None,  # tokens of each span, and its context
    ) -> None:
        rng = random.Random(seed)
        self.shape, self.heads = shape, heads
        token_bytes = dtype.itemsize * shape.kv_heads * (shape.k_dim + shape.v_dim)
        self.block_bytes = (block_tokens * token_bytes + 63) // 64 * 64
        usual = [(1, 1), (1, 70), (9, 9), (1, 131), (30, 77), (1, block_tokens), (2, 2 * block_tokens)]
        lengths = lengths or usual
        tables = [-(-context // block_tokens) for _, context in lengths]
        free = list(range(sum(tables)))
        rng.shuffle(free)
        self.spans, at = [], 0
        for (tokens, context), blocks in zip(lengths, tables, strict=True):
            self.spans.append(Span(at, tokens, context, [free.pop() for _ in range(blocks)]))
            at += tokens
        self.tokens = at
        self.arena = torch.zeros(sum(tables) * self.block_bytes, dtype=torch.uint8)
        self.kv = KvView(self.arena, self.block_bytes, [shape], dtype)
        for view in self.kv.views(0):
            view.copy_(noise(*view.shape, seed=seed))

    def call(self, **fields: Any) -> Call:
        s = self.shape
        given: dict[str, Any] = {"window": None, "softcap": None, "sinks": None, "scale": 0.3, **fields}
        return Call(
            layer=0,
            query=noise(1, self.heads, self.tokens, s.k_dim, seed=1).to(self.kv.dtype),
            key=noise(1, s.kv_heads, self.tokens, s.k_dim, seed=2).to(self.kv.dtype),
            value=noise(1, s.kv_heads, self.tokens, s.v_dim, seed=3).to(self.kv.dtype),
            bidirectional=False,
            unknown=(),
            **given,
        )


@pytest.mark.parametrize("extra", [{}, {"window": 5}, {"window": 64}, {"softcap": 2.0}, {"sinks": True}])
@pytest.mark.parametrize(
    ("kv_heads", "group", "k_dim", "v_dim"), [(1, 1, 8, 8), (3, 3, 64, 64), (2, 4, 20, 12), (1, 7, 256, 256)]
)
def test_attention(
    extra: dict[str, Any], kv_heads: int, group: int, k_dim: int, v_dim: int, native: Native
) -> None:
    """Decodes and chunks over scattered blocks, as torch computes them."""
    for block_tokens in (3, 11, 150):
        scene = Scene(
            LayerShape(kv_heads, k_dim, v_dim), kv_heads * group, torch.float32, block_tokens, seed=5
        )
        fields = dict(extra)
        if "sinks" in fields:
            fields["sinks"] = noise(kv_heads * group, seed=9)
        call = scene.call(**fields)
        expected = PagedBatch(scene.kv, scene.spans, CPU).attend(call)
        written = scene.arena.clone()
        for span in scene.spans:  # the rows that both have to write
            for position in range(span.context - span.tokens, span.context):
                for view in scene.kv.views(0):
                    view[span.table[position // block_tokens], position % block_tokens] = 7
        ours = PagedBatch(scene.kv, scene.spans, CPU, native).attend(call)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(scene.arena, written), "K and V were written elsewhere"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_on_sixteen_bit_kv(dtype: torch.dtype, native: Native) -> None:
    """K and V are rounded as torch rounds them when they are stored, and read back exactly."""
    scene = Scene(LayerShape(2, 24, 24), 4, dtype, 11, seed=6)
    call = scene.call()
    arena = scene.arena.view(dtype).float().view(torch.uint8)
    wide = KvView(arena, 2 * scene.block_bytes, [scene.shape], torch.float32)
    with native.exactly():
        expected = PagedBatch(wide, scene.spans, CPU, native).attend(call)
        ours = PagedBatch(scene.kv, scene.spans, CPU, native).attend(call)
    torch.testing.assert_close(ours, expected)
    stored = torch.stack([v.float() for v in scene.kv.views(0)])
    assert torch.equal(stored, torch.stack([v[:, : stored.shape[2]] for v in wide.views(0)]))


@pytest.mark.parametrize("extra", [{}, {"window": 5}, {"window": 51}, {"softcap": 2.0}])
@pytest.mark.parametrize(
    ("kv_heads", "group", "k_dim", "v_dim"), [(3, 3, 64, 64), (2, 4, 20, 12), (1, 7, 256, 250)]
)
def test_attention_by_bfloat16_products(
    extra: dict[str, Any], kv_heads: int, group: int, k_dim: int, v_dim: int, native: Native
) -> None:
    """Queries and weights are rounded to bfloat16, and nothing else is: an output errs by less than 1%."""
    shape = LayerShape(kv_heads, k_dim, v_dim)
    scene = Scene(shape, kv_heads * group, torch.bfloat16, 11, seed=8)
    call = scene.call(**extra)._replace(scale=k_dim**-0.5)
    with native.exactly():
        expected = PagedBatch(scene.kv, scene.spans, CPU, native).attend(call).float()
    ours = PagedBatch(scene.kv, scene.spans, CPU, native).attend(call).float()
    assert (ours - expected).norm() < 0.01 * expected.norm()
    assert not native.rounds or not torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20, 64])
def test_attention_does_not_depend_on_batch_or_chunks(dim: int, dtype: torch.dtype, native: Native) -> None:
    """A token's attention is the same bits alone, beside others, and however its prompt was cut."""
    scene = Scene(LayerShape(2, dim, dim), 6, dtype, 37, seed=7)
    call = scene.call(window=50)
    whole = PagedBatch(scene.kv, scene.spans, CPU, native).attend(call)
    span = next(span for span in scene.spans if span.tokens == 30)
    for first, tokens in [(0, 1), (1, 12), (13, 17)]:
        start = span.context - span.tokens + first
        part = Span(0, tokens, start + tokens, span.table)
        at = slice(span.first + first, span.first + first + tokens)
        some = call._replace(query=call.query[:, :, at], key=call.key[:, :, at], value=call.value[:, :, at])
        assert torch.equal(PagedBatch(scene.kv, [part], CPU, native).attend(some), whole[at])


def test_results_do_not_depend_on_threads(native: Native) -> None:
    """Threads take chunks as they come; what is computed is the same, call after call."""
    x, weight = noise(9, 200), noise(4000, 200)
    struct = linear_struct(weight, None)
    expected = native.linear(x, struct)
    try:
        native.set_threads(3)
        for _ in range(200):
            assert torch.equal(native.linear(x, struct), expected)
    finally:
        native.set_threads(1)


# -------------------------------------------------------------------------------------- whole models


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_one_call(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The common families run layer by layer; those that compute something else are left alone."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m", family))
    fast = rig.worker._resident["s"].fast
    whole = {"llama", "llama tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"}
    partly = {"deepseek_v3": 0}  # its attention is another
    expected = len(rig.shapes["s"].layers) if family in whole else partly.get(family, 0)
    assert len(fast.layers) == expected
    assert (fast.stack is not None) == (family in whole)
    replaced = dict(fast.replaced())  # as `seallmctl show` has it
    assert replaced.get("decoder layers", 0) == expected
    assert replaced.get("stack of all layers", 0) == (family in whole)
    assert replaced["linear layers"] == sum(
        type(m) is nn.Linear for m in rig.worker._resident["s"].model.modules()
    )


@pytest.mark.usefixtures("native")
def test_a_layer_that_computes_something_else_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Granite's layers look like Llama's and multiply their residuals: only the numbers tell."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m", "granite", residual_multiplier=0.7))
    assert rig.worker._resident["s"].fast.layers == []


@pytest.mark.usefixtures("native")
def test_a_scale_that_begins_late_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ministral 3 scales queries from `original_max_position_embeddings` on: near the beginning its layers
    give what Llama's do, and would be run as these, with wrong tokens for long prompts alone."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "llama_4_scaling_beta": 0.5}
    rope["original_max_position_embeddings"] = 16
    directory = save_tiny(tmp_path / "m", "ministral3", rope_parameters=rope)
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("long", directory)
    talk = Talk(rig, 1, "long", [3 + i * 7 % 90 for i in range(60)])
    run_step(rig, plain(directory), [(talk, 60)])
    rig.load("short", directory, context=16)
    assert len(rig.worker._resident["short"].fast.layers) == 4, "no request of it gets so far"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_families(
    family: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every family runs in 16 bits, in float32 arithmetic where it can, in its own where it cannot."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m", family), dtype=dtype)
    tokens = tuple(range(3, 15))
    admit = msg.Admit(1, tokens, 12, GREEDY)
    done = rig.step("s", [admit], [msg.Row(1, 0, 12, True, rig.blocks("s", 0, 12))])
    assert isinstance(done, msg.StepDone), done
    exact = family not in {"gpt2", "mixtral", "qwen3_moe", "gpt_oss"}
    assert (rig.logits.dtype is torch.float32) == exact


@pytest.mark.usefixtures("native")
def test_norms_are_known_by_what_they_compute() -> None:
    """The name says nothing: a module that subtracts the mean is no RMSNorm, whatever it is called."""

    class RMSNorm(nn.Module):
        def __init__(self, centred: bool) -> None:
            super().__init__()
            self.weight, self.eps, self.centred = nn.Parameter(noise(16)), 1e-6, centred

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reference.norm(
                x - x.mean(-1, keepdim=True) if self.centred else x, self.weight, self.eps, 1.0
            )

    assert modules.recognise_norm(RMSNorm(centred=False)) == (1e-6, 1.0)
    assert modules.recognise_norm(RMSNorm(centred=True)) is None

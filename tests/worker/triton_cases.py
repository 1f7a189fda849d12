"""Cases of the Triton operations against plain torch; test_triton.py runs them in the interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seallmd.core.shapes import LayerShape
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import reference, trials, triton_attention, triton_linear, triton_rows, triton_store
from seallmd.worker.ops.reference import Norm
from seallmd.worker.paged import PagedBatch
from seallmd.worker.quantised import Blocks
from seallmd.worker.tables import tables_of
from tests.worker.test_ops import CPU, Scene, noise

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # numpy's, which computes for the interpreter

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}
NAN = float("nan")
# KV heads, query heads that share one, K and V per head, tokens of a block, processors (many: keys are split)
SHAPES = [
    (1, 1, 8, 8, 3, 1),
    (3, 3, 64, 64, 11, 1000),
    (2, 4, 20, 12, 150, 1000),
    (1, 7, 80, 80, 11, 1),
    (2, 1, 192, 128, 11, 1000),
    (1, 20, 16, 16, 64, 1),
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 64},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 40, "sinks": True},
]


def call_of(scene: Scene, extra: dict[str, Any]) -> Call:
    return scene.call(**extra | ({"sinks": noise(scene.heads, seed=9)} if "sinks" in extra else {}))


def ours(kv: KvView, spans: list[Span], call: Call, processors: int) -> torch.Tensor:
    tables = tables_of(spans, kv.page, CPU)
    triton_store.write(kv, tables, call)
    return triton_attention.attend(kv, tables, call, processors)


def spoil(kv: KvView, spans: list[Span], new_too: bool) -> None:
    """NaN wherever no token lies yet; new_too: where the step's own tokens go as well."""
    for span in spans:
        for page in range(len(span.table)):
            begin = span.context - (span.tokens if new_too else 0) - page * kv.page.tokens
            for view in kv.views(0):
                view[span.table[page], max(begin, 0) :] = NAN


def compare(scene: Scene, call: Call, processors: int) -> None:
    """What comes out, and every byte of the arena afterwards."""
    expected = PagedBatch(scene.kv, scene.spans, CPU).attend(call)
    spoil(scene.kv, scene.spans, new_too=False)
    written = scene.arena.clone()
    spoil(scene.kv, scene.spans, new_too=True)
    out = ours(scene.kv, scene.spans, call, processors)
    tolerance = TOLERANCES[scene.kv.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(scene.arena, written), "K and V were written elsewhere, or not as torch rounds them"


@pytest.mark.parametrize("extra", EXTRAS)
def test_kinds_of_attention(extra: dict[str, Any]) -> None:
    """Decodes and chunks over scattered blocks that hold NaN where nothing was written; keys in parts too."""
    for processors in (1, 1000):
        scene = Scene(LayerShape(2, 24, 24), 6, torch.float32, 11, seed=5)
        compare(scene, call_of(scene, extra), processors)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...]) -> None:
    """Heads and blocks of sizes that are no powers of two, K and V of different sizes, many heads to one."""
    kv_heads, group, k_dim, v_dim, block_tokens, processors = shape
    scene = Scene(LayerShape(kv_heads, k_dim, v_dim), kv_heads * group, torch.float32, block_tokens, seed=6)
    compare(scene, scene.call(), processors)


def test_sixteen_bits() -> None:
    """K and V are stored as torch rounds them, sums are in float32, outputs have the dtype of the query."""
    scene = Scene(LayerShape(2, 24, 16), 4, torch.float16, 11, seed=6)
    compare(scene, call_of(scene, {"window": 50, "sinks": True}), 1000)


def test_storing_bfloat16() -> None:
    """As torch rounds it. (The interpreter cannot multiply bfloat16: attention in it needs a GPU.)"""
    scene = Scene(LayerShape(2, 24, 16), 4, torch.bfloat16, 11, seed=6)
    call = scene.call()
    PagedBatch(scene.kv, scene.spans, CPU).attend(call)
    written = scene.arena.clone()
    scene.arena[:] = 255
    triton_store.write(scene.kv, tables_of(scene.spans, scene.kv.page, CPU), call)
    new = scene.arena.view(torch.int16) != -1
    assert torch.equal(scene.arena.view(torch.int16)[new], written.view(torch.int16)[new])
    assert int(new.sum()) == scene.tokens * 2 * (24 + 16)


def test_random_steps() -> None:
    """Any mixture of spans, chunks longer than a tile among them."""
    for seed in range(6):
        rng = random.Random(seed)
        lengths = [(n, n + rng.choice((0, rng.randrange(90)))) for n in (1, rng.randrange(1, 200), 1)]
        shape, heads = LayerShape(rng.choice((1, 2)), 16, 16), rng.choice((2, 6))
        scene = Scene(shape, heads, torch.float32, rng.randrange(3, 40), seed, lengths)
        compare(scene, scene.call(window=rng.choice((None, 33))), rng.choice((1, 50)))


def test_parts_take_no_memory_for_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token behind a long context, beside a prompt: its parts are as many as if it were alone."""
    scene = Scene(LayerShape(1, 16, 16), 2, torch.float32, 40, 3, [(1, 600), (64, 64)])
    made = list[tuple[int, ...]]()

    def empty(*size: int, **kind: Any) -> torch.Tensor:
        made.append(size)
        return torch.zeros(*size, **kind)

    monkeypatch.setattr(triton_attention.torch, "empty", empty)
    ours(scene.kv, scene.spans, scene.call(), 4)
    assert made == [(1, 2, 2, 16), (2, 1, 2, 2)]


def test_a_block_per_layer() -> None:
    """In the split layout a page is a run of blocks, and a layer reads its own."""
    shapes = [LayerShape(2, 16, 16), LayerShape(1, 8, 8)]
    block_bytes, pages = 5 * 4 * 2 * 32, 9
    arena = torch.zeros(2 * pages * block_bytes, dtype=torch.uint8)
    kv = KvView(arena, block_bytes, shapes, torch.float32, "split")
    order = random.Random(1).sample(range(2 * pages), 2 * pages)
    spans = [Span(0, 1, 17, order[:8]), Span(1, 21, 25, order[8:])]
    for layer, shape in enumerate(shapes):
        for view in kv.views(layer):
            view.copy_(noise(*view.shape, seed=layer))
        heads, tokens = shape.kv_heads, 22
        query, key, value = (noise(1, h, tokens, shape.k_dim, seed=h) for h in (4, heads, heads))
        call = Call(layer, query, key, value, 0.3, None, None, None, bidirectional=False, unknown=())
        expected = PagedBatch(kv, spans, CPU).attend(call)
        torch.testing.assert_close(ours(kv, spans, call, 1), expected, atol=2e-5, rtol=1e-4)


def test_far_blocks() -> None:
    """An arena is larger than 2 GiB: offsets of its last blocks do not fit 32 bits, even in elements."""
    shape, dtype, block_bytes = LayerShape(2, 16, 16), torch.float16, 1 << 20
    blocks = (5 << 30) // block_bytes  # 2.5e9 elements; only the pages that are touched take memory
    arena = torch.empty(blocks * block_bytes, dtype=torch.uint8)
    kv = KvView(arena, block_bytes, [shape], dtype)
    spans = [Span(0, 1, 40, [blocks - 1]), Span(1, 12, 12, [blocks - 2])]
    for view in kv.views(0):
        view[blocks - 2 :, :40] = noise(2, 40, 2, 16).to(dtype)
    query, key, value = (noise(1, h, 13, 16, seed=h).to(dtype) for h in (4, 2, 2))
    call = Call(0, query, key, value, 0.3, None, None, None, bidirectional=False, unknown=())
    expected = PagedBatch(kv, spans, CPU).attend(call)
    torch.testing.assert_close(ours(kv, spans, call, 1), expected, atol=4e-3, rtol=4e-3)


def test_parts() -> None:
    """Keys are split where programs are few and contexts long, and never beyond what is worth it."""
    assert triton_attention.splits_of(8, 100, None, 132) == 1
    assert triton_attention.splits_of(8, 100_000, None, 132) == 32
    assert triton_attention.splits_of(1, 1_000_000, None, 132) == 64
    assert triton_attention.splits_of(8, 100_000, 1000, 132) == 4
    assert triton_attention.splits_of(4096, 100_000, None, 132) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 33, 576])
def test_norm(n: int, dtype: torch.dtype) -> None:
    """Both kinds of RMSNorm over rows that lie apart, sums in float32."""
    for offset in (0.0, 1.0):
        weight, x = noise(n).to(dtype), noise(3, 5, n, seed=2).to(dtype).transpose(0, 1)
        ours = triton_rows.norm(x, weight, 1e-6, offset)
        expected = reference.norm(x.float(), weight, 1e-6, offset).to(dtype)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=2e-3)
    assert triton_rows.norm(x[:0], weight, 1e-6, 0.0).shape == (0, 3, n)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gated(activation: str) -> None:
    """Parts of one matrix, as merged projections give them, and the ends where an exponential overflows."""
    both = 4 * noise(3, 2, 2 * 1100)
    both[0, 0, :4] = torch.tensor([-1e4, -90.0, 90.0, 1e4])
    gate, up = both.chunk(2, -1)
    ours = triton_rows.gated(gate, up, activation)
    torch.testing.assert_close(ours, reference.gated(gate, up, activation), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 33, 576])
def test_add_norm(n: int, dtype: torch.dtype) -> None:
    """The sum is stored as torch rounds it, and the norm is of what is stored; a norm before the sum."""
    x, y = (noise(3, 5, n, seed=seed).to(dtype).transpose(0, 1) for seed in (2, 3))
    before, after = Norm(noise(n).to(dtype), 1e-6, 0.0), Norm(noise(n, seed=4).to(dtype), 1e-5, 1.0)
    for norm in (None, after):
        total, normed = triton_rows.add_norm(x, y, before, norm)
        added = y if norm is None else reference.norm(y.float(), *norm).to(dtype)
        torch.testing.assert_close(total, x + added, atol=1e-5, rtol=2e-3)
        expected = reference.norm(total.float(), *before).to(dtype)
        torch.testing.assert_close(normed, expected, atol=1e-5, rtol=2e-3)
    assert torch.equal(triton_rows.add_norm(x, y, before)[0], x + y)
    assert triton_rows.add_norm(x[:0], y[:0], before)[1].shape == (0, 3, n)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim", "width", "normed"),
    [(1, 1, 8, 8, 8, False), (9, 3, 64, 64, 64, True), (20, 10, 20, 12, 8, True), (7, 1, 80, 80, 32, False)],
)
def test_rotation_and_storing(
    heads: int, kv_heads: int, k_dim: int, v_dim: int, width: int, normed: bool
) -> None:
    """Whole heads and a part of them, more of them than one program takes, with norms and without; every byte
    of the arena afterwards. Heads lie side by side, as a merged projection gives them."""
    for dtype in (torch.float32, torch.float16):
        scene = Scene(LayerShape(kv_heads, k_dim, v_dim), heads, dtype, 11, seed=5)
        sizes = (heads * k_dim, kv_heads * k_dim, kv_heads * v_dim)
        packed = noise(scene.tokens, sum(sizes), seed=8).to(dtype)
        counts = (heads, kv_heads, kv_heads)
        query, key, value = (
            part.unflatten(1, (count, -1)).transpose(0, 1)[None]
            for part, count in zip(packed.split(sizes, 1), counts, strict=True)
        )
        call = scene.call()._replace(query=query, key=key, value=value)
        angle = noise(scene.tokens, width // 2, seed=4)
        cos, sin = (torch.cat((part, part), -1).to(dtype)[None] for part in (angle.cos(), angle.sin()))
        norms = [Norm(noise(k_dim, seed=n).to(dtype), 1e-6, 1.0) if normed else None for n in (1, 2)]
        expected = [
            reference.rotate_normed(x[0].transpose(0, 1).float(), cos[0].float(), sin[0].float(), norm)
            for x, norm in zip((query, key), norms, strict=True)
        ]
        before = scene.arena.clone()
        new_key = expected[1].to(dtype).transpose(0, 1)[None]
        PagedBatch(scene.kv, scene.spans, CPU).attend(call._replace(key=new_key))
        stored = [view.clone() for view in scene.kv.views(0)]
        scene.arena[:] = before
        tables = tables_of(scene.spans, scene.kv.page, CPU)
        turned = triton_store.rotate(scene.kv, tables, call, cos, sin, *norms)
        tolerance = {torch.float32: 1e-5, torch.float16: 6e-3}[dtype]
        torch.testing.assert_close(
            turned[0].transpose(0, 1).float(), expected[0], atol=tolerance, rtol=tolerance
        )
        torch.testing.assert_close(scene.kv.views(0)[0], stored[0], atol=tolerance, rtol=tolerance)
        assert torch.equal(scene.kv.views(0)[1], stored[1])
        untouched = scene.kv.views(0)[0] == before.view(dtype).as_strided(
            scene.kv.views(0)[0].shape, scene.kv.views(0)[0].stride()
        )
        assert int((~untouched.flatten(2).all(-1)).sum()) == scene.tokens


@pytest.mark.parametrize(("n", "k"), [(3, 5), (16, 32), (100, 70), (130, 192)])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear(n: int, k: int, bias: bool) -> None:
    """Any number of rows, outputs and inputs; a view of wider rows; nothing."""
    for dtype in (torch.float32, torch.float16):
        blocks = Blocks.empty(n, k)
        blocks.fill(noise(n, k))
        b = noise(n, seed=1).to(dtype) if bias else None
        for rows in (0, 1, 17, 70):
            x = noise(1, rows, k + 3, seed=rows).to(dtype)[..., :k]
            found = triton_linear.linear(x, blocks, b)
            assert found.dtype is dtype
            expected = blocks.linear(x.float(), b)
            tolerance = {torch.float32: 1e-4, torch.float16: 2e-2}[dtype]
            torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_trial(tmp_path: Path) -> None:
    """Operations that agree are in use; one that computes something else, or fails, gives way alone."""
    said: list[str] = []
    good = trials.start(CPU, tmp_path, said.append)
    assert good is not None
    assert (good.names(), said) == (["attention", "norm", "gated", "add+norm", "rotation", "int8 linear"], [])
    assert not list(tmp_path.glob("triton-trial*"))

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return triton_rows.norm(x, weight, eps, abs(offset - 0.1))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    left = trials.tried(replace(good, norm=wrong, gated=broken), CPU, said.append)
    assert left is not None
    assert left.names() == ["attention", "add+norm", "rotation", "int8 linear"]
    assert [line.partition(" ")[0] for line in said] == ["norm", "gated"]
    assert "out of shared memory" in said[1]


def test_a_trial_that_ended_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of a GPU ends the process: the next one must not try again, or it would never serve."""

    def fault(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(trials, "tried", fault)
    with pytest.raises(torch.AcceleratorError):
        trials.start(CPU, tmp_path, print)
    monkeypatch.undo()
    said: list[str] = []
    assert trials.start(CPU, tmp_path, said.append) is None
    assert "ended the process" in said[0]

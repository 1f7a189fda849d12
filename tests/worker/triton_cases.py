"""Cases of the Triton operations against plain torch; test_triton.py runs them in the interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seallmd.core.messages import LayerShape
from seallmd.worker import ops
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import kernels, reference, triton_attention, triton_rows
from seallmd.worker.paged import PagedBatch
from seallmd.worker.tables import tables_of
from tests.worker.helpers import Rig, Talk, plain, run_step, save_tiny
from tests.worker.test_graphs import Rerun
from tests.worker.test_ops import CPU, Scene, noise
from tools import bench_gpu

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
    triton_attention.write(kv, tables, call)
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
    triton_attention.write(scene.kv, tables_of(scene.spans, scene.kv.page, CPU), call)
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


def test_a_trial(tmp_path: Path) -> None:
    """Operations that agree are in use; one that computes something else, or fails, gives way alone."""
    said: list[str] = []
    good = kernels.start(CPU, tmp_path, said.append)
    assert good is not None
    assert (good.names(), said) == (["attention", "norm", "gated"], [])
    assert not list(tmp_path.glob("triton-trial*"))

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        return triton_rows.norm(x, weight, eps, abs(offset - 0.1))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    left = kernels.tried(replace(good, norm=wrong, gated=broken), CPU, said.append)
    assert left is not None
    assert left.names() == ["attention"]
    assert [line.partition(" ")[0] for line in said] == ["norm", "gated"]
    assert "out of shared memory" in said[1]


def test_a_trial_that_ended_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of a GPU ends the process: the next one must not try again, or it would never serve."""

    def fault(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "tried", fault)
    with pytest.raises(torch.AcceleratorError):
        kernels.start(CPU, tmp_path, print)
    monkeypatch.undo()
    said: list[str] = []
    assert kernels.start(CPU, tmp_path, said.append) is None
    assert "ended the process" in said[0]


class Watched:
    """The kernels, with a count of the calls of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = dict.fromkeys(("attention", "norm", "gated"), 0)
        self.wrong_layer = -1

        def attend(kv: KvView, tables: Any, call: Call, processors: int) -> torch.Tensor:
            self.calls["attention"] += 1
            out = triton_attention.attend(kv, tables, call, processors)
            return 2 * out if call.layer == self.wrong_layer else out

        def norm(*arguments: Any) -> torch.Tensor:
            self.calls["norm"] += 1
            return triton_rows.norm(*arguments)

        def gated(*arguments: Any) -> torch.Tensor:
            self.calls["gated"] += 1
            return triton_rows.gated(*arguments)

        attention = SimpleNamespace(write=triton_attention.write, attend=attend)
        whole = kernels.Kernels(attention, norm, gated, processors=64)  # type: ignore[arg-type]
        monkeypatch.setattr(ops, "_kernels", whole)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_models(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole models in the worker, prompts in chunks beside decodes, with graphs: the plain model's logits."""
    watched, recorder = Watched(monkeypatch), Rerun()
    model = plain(save_tiny(tmp_path / "m", family, num_hidden_layers=2, layer_types=None))
    rig = recorder.rig = Rig(monkeypatch, tmp_path / "cache", recorder=recorder)
    rig.load("s", tmp_path / "m")
    shown = dict(rig.worker._resident["s"].operations())  # what `seallmctl show` says
    assert shown["attention (Triton)"] == 2
    assert shown["norms (Triton)"] == {"llama": 5, "gemma2": 9, "gpt_oss": 5}[family]
    assert shown.get("gates (Triton)", 0) == (0 if family == "gpt_oss" else 2)
    rig.spoil(rig.free)  # nothing is cleared: kernels never read what was not written
    watched.calls = dict.fromkeys(watched.calls, 0)
    first, second = (Talk(rig, n, "s", [(5 * i + n) % 90 + 3 for i in range(14)]) for n in (1, 2))
    run_step(rig, model, [(first, 14)])
    run_step(rig, model, [(second, 6), (first, 1)])
    run_step(rig, model, [(first, 1), (second, 8)])
    for _ in range(3):
        run_step(rig, model, [(first, 1), (second, 1)])
    assert watched.calls["attention"] == 2 * 6
    assert watched.calls["norm"] >= 6 * 5
    assert recorder.replayed == 2


def test_a_model_whose_attention_disagrees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer that is off, and the model runs on plain torch; that is told."""
    watched = Watched(monkeypatch)
    watched.wrong_layer = 2
    model = plain(save_tiny(tmp_path / "m"))
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", tmp_path / "m")
    assert "attention of llama in plain torch, the Triton operation failed" in capsys.readouterr().err
    assert "attention (Triton)" not in dict(rig.worker._resident["s"].operations())
    watched.calls["attention"] = 0
    talk = Talk(rig, 1, "s", [3, 4, 5])
    run_step(rig, model, [(talk, 3)])
    run_step(rig, model, [(talk, 1)])
    assert watched.calls["attention"] == 0


def test_the_bench_measures_them() -> None:
    """What tools/bench_gpu.py prints beside plain torch, which no other test runs."""
    whole = kernels.Kernels(triton_attention, triton_rows.norm, triton_rows.gated, processors=64)
    for case in (kernels.CASES[0], kernels.CASES[3]):
        assert bench_gpu.attention_error(case, CPU, torch.float32, whole) < 1e-4

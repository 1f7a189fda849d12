"""Whole models on the Triton operations; test_triton.py runs these cases in Triton's interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from seallmd.core.shapes import LayerShape
from seallmd.worker import ops
from seallmd.worker.attention import NAME, Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops import gpu_model, trials, triton_attention, triton_rows, triton_store
from seallmd.worker.ops.gpu_layers import KernelLayer
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.layers import probe_kv
from seallmd.worker.static_steps import MixedStep
from tests.worker.helpers import Rig, Talk, plain, run_step, save_tiny
from tests.worker.ranks import Ranks
from tests.worker.test_graphs import Rerun
from tests.worker.test_ops import CPU
from tools import gpu_parity, gpu_times

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # numpy's, which computes for the interpreter


class Watched:
    """The kernels, with a count of the calls of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        self.wrong_layer = -1
        self.lock = threading.Lock()  # the interpreter runs one kernel at a time; ranks are threads here

        def attend(kv: KvView, tables: Any, call: Call, processors: int) -> torch.Tensor:
            out = triton_attention.attend(kv, tables, call, processors)
            return 2 * out if call.layer == self.wrong_layer else out

        self.kernels = Kernels(
            SimpleNamespace(attend=self.counted("attention", attend)),  # type: ignore[arg-type]
            self.counted("write", triton_store.write),
            self.counted("norm", triton_rows.norm),
            self.counted("gated", triton_rows.gated),
            self.counted("add_norm", triton_rows.add_norm),
            self.counted("rotate", triton_store.rotate),
            processors=64,
        )
        monkeypatch.setattr(ops, "_kernels", self.kernels)

    def counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        self.calls[name] = 0

        def call(*arguments: Any) -> Any:
            with self.lock:
                self.calls[name] += 1
                return operation(*arguments)

        return call

    def forget(self) -> None:
        self.calls = dict.fromkeys(self.calls, 0)


# Calls of a step with two layers, by family; norms are of query and key where nothing else is said.
STEPS = {
    "llama": {"attention": 2, "rotate": 2, "norm": 1, "add_norm": 4, "gated": 2},
    "qwen2": {"attention": 2, "rotate": 2, "norm": 1, "add_norm": 4, "gated": 2},  # with biases
    "qwen3": {"attention": 2, "rotate": 2, "norm": 1, "add_norm": 4, "gated": 2},  # norms of query and key
    "gemma3_text": {"attention": 2, "rotate": 2, "norm": 1, "add_norm": 4, "gated": 2},  # sandwiches
    "mixtral": {"attention": 2, "rotate": 2, "norm": 1, "add_norm": 4},  # experts
    "gpt_oss": {"attention": 2, "write": 2, "norm": 5},  # sinks: its layers stay as they are
    "granite": {"attention": 2, "write": 2, "norm": 5, "gated": 2},  # multiplies what it adds: so do these
}


@pytest.mark.parametrize("family", STEPS)
def test_models(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole models in the worker, prompts in chunks beside decodes, with graphs: the plain model's logits, by
    the operations that the family can have and no others."""
    watched, recorder = Watched(monkeypatch), Rerun()
    extra = {"residual_multiplier": 0.7} if family == "granite" else {}
    model = plain(save_tiny(tmp_path / "m", family, num_hidden_layers=2, layer_types=None, **extra))
    rig = recorder.rig = Rig(monkeypatch, tmp_path / "cache", recorder=recorder)
    rig.load("s", tmp_path / "m")
    shown = dict(rig.worker._resident["s"].operations())  # what `seallmctl show` says
    assert shown["attention (Triton)"] == 2
    whole = "add_norm" in STEPS[family]
    assert shown.get("decoder layers (Triton)", 0) == 2 * whole
    assert shown.get("stack of all layers (Triton)", 0) == whole
    assert shown.get("gates (Triton)", 0) == STEPS[family].get("gated", 0)
    rig.spoil(rig.free)  # nothing is cleared: kernels never read what was not written
    watched.forget()
    first, second = (Talk(rig, n, "s", [(5 * i + n) % 90 + 3 for i in range(14)]) for n in (1, 2))
    run_step(rig, model, [(first, 14)])
    run_step(rig, model, [(second, 6), (first, 1)])
    run_step(rig, model, [(first, 1), (second, 8)])
    for _ in range(3):
        run_step(rig, model, [(first, 1), (second, 1)])
    # Six steps; the first two have shapes that are new, and run beside the ordinary way.
    assert {name: calls for name, calls in watched.calls.items() if calls} == {
        name: 7 * calls for name, calls in STEPS[family].items()
    }
    assert recorder.replayed == 4


def rows_of_four_tokens(call: Call) -> int:
    return 4 * call.query.shape[1] // call.key.shape[1]


def test_prompts_from_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps with chunks of several requests, some over several tiles, some that draw nothing, beside single
    tokens and windows: from graphs, the plain model's logits and tokens, whatever lay around before."""
    watched, recorder = Watched(monkeypatch), Rerun()
    model = plain(save_tiny(tmp_path / "m", "gemma3_text", num_hidden_layers=2, layer_types=None))
    rig = recorder.rig = Rig(monkeypatch, tmp_path / "cache", recorder=recorder)
    rig.load("s", tmp_path / "m")
    monkeypatch.setattr(triton_attention, "_chunk_rows", rows_of_four_tokens)
    rig.spoil(rig.free)
    watched.forget()
    lengths = (30, 21, 4, 14)
    prompts = [[(5 * i + n) % 90 + 3 for i in range(tokens)] for n, tokens in enumerate(lengths)]
    talks = [Talk(rig, n, "s", prompt) for n, prompt in enumerate(prompts)]
    run_step(rig, model, [(talks[2], 4)])
    work = [(5, 3), (9, 3), (4, 1), (1, 10), (7, 1), (2, 2), (2, 1)]  # tokens of the first two
    for ours, theirs in work:
        run_step(rig, model, list(zip(talks, (ours, theirs, 1, 2), strict=True)))
    assert recorder.replayed == len(work), "all had the shape of the very first step"
    untouched = rig.device.arena.view(-1, rig.block_bytes)[rig.free]
    assert bool((untouched == 255).all())
    assert watched.calls["attention"] == 2 * (len(work) + 2), "the first step runs twice"


def test_prompts_that_differ_from_graphs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that comes out otherwise when padded: its own answer stands, and no such step is captured, which
    is told; single tokens keep their graphs."""
    Watched(monkeypatch)
    recorder = Rerun()
    model = plain(save_tiny(tmp_path / "m", num_hidden_layers=1))
    rig = recorder.rig = Rig(monkeypatch, tmp_path / "cache", recorder=recorder)
    rig.load("s", tmp_path / "m")
    run = MixedStep.run
    monkeypatch.setattr(MixedStep, "run", lambda self: 1.1 * run(self))
    talk = Talk(rig, 1, "s", list(range(3, 20)))
    for _ in range(3):
        run_step(rig, model, [(talk, 17)])
        talk = Talk(rig, talk.request + 1, "s", list(range(3, 20)))
    assert "steps with prompts of llama run without graphs: their logits are off" in capsys.readouterr().err
    assert recorder.captured == 0
    run_step(rig, model, [(talk, 17)])
    for _ in range(3):
        run_step(rig, model, [(talk, 1)])
    assert recorder.replayed == 2


@pytest.mark.parametrize(
    ("missing", "calls"),
    [
        ("add_norm", {"attention", "rotate", "norm", "gated"}),
        ("rotate", {"attention", "write", "norm", "add_norm", "gated"}),
        ("attention", {"norm", "add_norm", "gated"}),
        ("norm", {"attention", "rotate", "add_norm", "gated"}),
    ],
)
def test_layers_without_an_operation(
    missing: str, calls: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What failed its trial gives way to plain torch inside a layer, and takes nothing else along."""
    watched = Watched(monkeypatch)
    monkeypatch.setattr(ops, "_kernels", replace(watched.kernels, **{missing: None}))
    model = plain(save_tiny(tmp_path / "m", "gemma3_text", num_hidden_layers=1, layer_types=None))
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", tmp_path / "m")
    assert dict(rig.worker._resident["s"].operations())["stack of all layers (Triton)"] == 1
    watched.forget()
    talk = Talk(rig, 1, "s", [3, 4, 5, 6])
    run_step(rig, model, [(talk, 4)])
    run_step(rig, model, [(talk, 1)])
    assert {name for name, count in watched.calls.items() if count} == calls


def test_layers_that_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operation that cannot be compiled for a model leaves its layers as they were, with a line that says
    so; one that computes something else in it leaves them too."""

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    def wrong(*arguments: Any) -> torch.Tensor:
        return -triton_store.rotate(*arguments)

    watched = Watched(monkeypatch)
    model = plain(save_tiny(tmp_path / "m", num_hidden_layers=1))
    for number, rotate in enumerate((broken, wrong)):
        monkeypatch.setattr(ops, "_kernels", replace(watched.kernels, rotate=rotate))
        rig = Rig(monkeypatch, tmp_path / f"cache{number}")
        rig.load("s", tmp_path / "m")
        line = "layers of llama run as they are: out of shared memory"
        assert (line in capsys.readouterr().err) == (rotate is broken)
        shown = dict(rig.worker._resident["s"].operations())
        assert "decoder layers (Triton)" not in shown
        assert shown["attention (Triton)"] == 1
        run_step(rig, model, [(Talk(rig, 1, "s", [3, 4, 5]), 3)])


def test_hooks_that_would_be_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A layer is left alone where something has hooks that is not called in the fused layer."""
    kernels = Watched(monkeypatch).kernels
    save_tiny(tmp_path / "m", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=NAME)
    model.requires_grad_(False)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: None)
    shapes = [LayerShape(2, 8, 8)] * 2
    gpu_model.install(model, probe_kv(shapes, torch.float32, CPU), 64, kernels, print)
    fused = [isinstance(layer.__dict__.get("forward"), KernelLayer) for layer in model.model.layers]
    assert fused == [True, False]
    assert "forward" not in model.model.__dict__


def test_a_tensor_parallel_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each rank's layers run on the operations, and the sums that its hooks ask for happen."""
    watched = Watched(monkeypatch)
    model = plain(save_tiny(tmp_path / "m", "qwen3", num_hidden_layers=2, vocab_size=96))
    ranks = Ranks(monkeypatch, tmp_path, 2)
    ranks.load("s", tmp_path / "m")
    for rig in ranks.rigs:
        shown = dict(rig.worker._resident["s"].operations())
        assert shown["stack of all layers (Triton)"] == 1
        assert shown["gates (Triton)"] == 2
    watched.forget()
    talks = ranks.talks(1, "s", [3, 4, 5, 6, 7])
    for count in (5, 1):
        ranks.step(model, [(talks, count)])
    expected = {"attention": 8, "rotate": 8, "norm": 4, "add_norm": 16, "gated": 8, "write": 0}
    assert watched.calls == expected


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


def test_the_bench_compares_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What tools/bench_gpu.py prints of every operation beside plain torch, which no other test runs: errors
    and times."""
    whole = Watched(monkeypatch).kernels
    monkeypatch.setattr(trials, "CASES", (trials.CASES[0], trials.CASES[2], trials.CASES[3]))
    monkeypatch.setattr(torch, "bfloat16", torch.float16)  # the interpreter cannot multiply bfloat16
    assert gpu_parity.check_operations(CPU, whole)
    gpu_times.time_operations(CPU, whole, gpu_times.SMALL)
    out = capsys.readouterr().out
    names = (
        "decode, Triton",
        "norm of",
        "add+norm of",
        "norm+add+norm",
        "rotation of 48",
        "silu",
        "sampling",
    )
    assert all(name in out for name in names)
    assert out.count(", plain torch ") == 6

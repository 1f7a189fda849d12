"""FlashAttention behind the seam, by a stand-in in plain torch that has its interface and its conditions.

test_triton.py runs these cases in Triton's interpreter: Triton stores K and V, and is what has to be beaten.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.core.shapes import LayerShape
from seallmd.worker import ops
from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView, Span
from seallmd.worker.ops import trials, triton_attention, triton_store
from seallmd.worker.ops.flash import Flash
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.paged import PagedBatch
from seallmd.worker.tables import tables_of
from tests.worker.helpers import GREEDY, Rig, save_tiny
from tests.worker.test_graphs import Rerun
from tests.worker.test_ops import CPU, noise

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # numpy's, which computes for the interpreter
TRITON = Kernels(triton_attention, triton_store.write, rotate=triton_store.rotate)  # type: ignore[arg-type]


class Library:
    """A stand-in for `flash_attn_interface`. careless: reads keys behind the last token, under a mask.

    factor: what its results are multiplied by.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []  # longest query of each
        self.careless, self.factor, self.error = False, 1.0, ""

    def flash_attn_with_kvcache(
        self,
        q: torch.Tensor,  # [tokens, heads, dim]
        k_cache: torch.Tensor,  # [blocks, tokens of a block, KV heads, dim]
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        page_table: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> torch.Tensor:
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(max_seqlen_q)
        assert q.dtype is k_cache.dtype is v_cache.dtype is torch.float16
        assert cache_seqlens.dtype is page_table.dtype is cu_seqlens_q.dtype is torch.int32
        assert cache_seqlens.is_contiguous()
        assert cu_seqlens_q.is_contiguous()
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == page_table.stride(-1) == 1
        assert causal
        starts, out = cu_seqlens_q.tolist(), torch.empty_like(q)
        assert max_seqlen_q == max(b - a for a, b in itertools.pairwise(starts))
        for n, length in enumerate(cache_seqlens.tolist()):
            rows = slice(starts[n], starts[n + 1])
            pages = page_table[n, : -(-length // k_cache.shape[1])].long()
            keys, values = (cache[pages].flatten(0, 1).float() for cache in (k_cache, v_cache))
            if not self.careless:
                keys, values = keys[:length], values[:length]
            query = q[rows].float().unflatten(1, (keys.shape[1], -1))
            scores = torch.einsum("qhgd,khd->hgqk", query, keys) * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            at = torch.arange(length - query.shape[0], length)[:, None]
            key = torch.arange(keys.shape[0])
            seen = key <= at
            if window_size[0] >= 0:
                seen &= key >= at - window_size[0]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[rows] = self.factor * torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(
                q.dtype
            )
        return out


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    function = found.flash_attn_with_kvcache
    module = SimpleNamespace(flash_attn_with_kvcache=function, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return found


def seconds(decodes: float, chunks: float) -> Callable[[Kernels, trials.Scene, torch.device], float]:
    """Of FlashAttention; Triton takes one."""

    def seconds_of(kernels: Kernels, scene: trials.Scene, _: torch.device) -> float:
        if kernels.flash is None:
            return 1.0
        return decodes if scene.spans[0].tokens == 1 else chunks

    return seconds_of


@pytest.mark.parametrize(
    ("decodes", "chunks", "label"),
    [
        (0.5, 0.5, "; FlashAttention 3 for single tokens and prompts"),
        (2.0, 0.5, "; FlashAttention 3 for prompts"),
        (0.5, 2.0, "; FlashAttention 3 for single tokens"),
        (2.0, 2.0, ""),
    ],
)
def test_the_quicker_one_wins(
    decodes: float, chunks: float, label: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For single tokens and for prompts by themselves; the log has the figures, the label of the device the
    winner."""
    monkeypatch.setattr(trials, "CASES", (trials.CASES[0], trials.CASES[3]))
    said: list[str] = []
    kernels = trials.with_flash(TRITON, CPU, said.append, seconds(decodes, chunks))
    assert kernels.summary() == "Triton attention, rotation" + label
    winners = [line.split(": ")[1].partition(" (")[0] for line in said]
    assert winners == ["FlashAttention 3" if figure < 1 else "Triton" for figure in (decodes, chunks)]
    library.calls.clear()
    for case, wanted in ((trials.CASES[0], decodes < 1), (trials.CASES[1], chunks < 1)):
        assert trials.attention_error(case, kernels, CPU, torch.float16) < 1e-2
        assert bool(library.calls) == wanted
        library.calls.clear()


def test_it_is_timed(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock of a test's own, too."""
    monkeypatch.setattr(trials, "CASES", trials.CASES[:1])
    small = {"decodes": trials.Case("single tokens", ((1, 9),)), "chunks": trials.Case("prompts", ((4, 9),))}
    monkeypatch.setattr(trials, "_TIMED", small)
    said: list[str] = []
    trials.with_flash(TRITON, CPU, said.append)
    assert len(said) == 2
    assert all("us, Triton " in line for line in said)
    assert {1, 4} <= set(library.calls)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"factor": 1.1}, "failed its trial in torch.float16: it is off by"),
        ({"careless": True}, "failed its trial in torch.float16: it is off by inf"),
        ({"error": "only supports Hopper"}, "failed its trial in torch.float16: only supports Hopper"),
    ],
)
def test_one_that_is_wrong_stays_out(
    fault: dict[str, Any], line: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other results, keys read that nobody wrote, an error: it is told, and Triton stays, however slow."""
    monkeypatch.setattr(trials, "CASES", trials.CASES[:1])
    vars(library).update(fault)
    said: list[str] = []
    kernels = trials.with_flash(TRITON, CPU, said.append, seconds(0.1, 0.1))
    assert kernels is TRITON
    assert line in said[0]


def test_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said, since nothing is missing; one that cannot be imported is told."""
    said: list[str] = []
    assert trials.with_flash(TRITON, CPU, said.append) is TRITON
    assert said == []
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(__spec__=SimpleNamespace()))
    assert trials.with_flash(TRITON, CPU, said.append) is TRITON
    assert "cannot be imported" in said[0]


def test_a_trial_that_ended_the_process(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next start leaves FlashAttention alone, and nothing else."""

    def fault(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(trials, "CASES", trials.CASES[:1])
    monkeypatch.setattr(trials, "with_flash", fault)
    with pytest.raises(torch.AcceleratorError):
        trials.start(CPU, tmp_path, print)
    said: list[str] = []
    kernels = trials.start(CPU, tmp_path, said.append)
    assert kernels is not None
    assert kernels.flash is None
    assert "FlashAttention 3 is not used: its last trial ended the process" in said[0]
    assert library.calls == []


@pytest.mark.parametrize(("kills", "refused"), [(1, False), (2, True)])
def test_a_start_that_was_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kills: int, refused: bool
) -> None:
    """Who ends the daemon while operations are compiled does not switch them off; a start that never comes
    back does."""

    class Killed(BaseException):
        """Nothing runs after SIGKILL but what has been written stays."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as first:
        first.setattr(trials, "tried", killed)
        for _ in range(kills):
            with pytest.raises(Killed):
                trials.start(CPU, tmp_path, print)
    said: list[str] = []
    monkeypatch.setattr(trials, "tried", lambda *_: None)
    trials.start(CPU, tmp_path, said.append)
    assert any("ended the process" in line for line in said) == refused
    assert bool(list(tmp_path.glob("triton-trial*"))) == refused


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """The worker starts all the same, in plain torch."""
    (tmp_path / "file").touch()
    said: list[str] = []
    assert trials.start(CPU, tmp_path / "file" / "cache", said.append) is None
    assert "plain torch operations" in said[0]


@pytest.mark.parametrize("layout", ["merged", "split"])
@pytest.mark.parametrize("extra", [{}, {"window": 5}, {"softcap": 2.0}])
def test_both_layouts(layout: str, extra: dict[str, Any], library: Library) -> None:
    """It gets K and V where they lie, among those of other layers, by block tables of the layer."""
    shapes = [LayerShape(2, 16, 16), LayerShape(1, 8, 8)]
    arena = torch.zeros(64 * 1600, dtype=torch.uint8)
    kv = KvView(arena, 1600, shapes, torch.float16, layout)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    spans = [Span(0, 1, 17, order[:20]), Span(1, 5, 5, order[20:40]), Span(6, 21, 25, order[40:])]
    kernels = replace(TRITON, flash=Flash(library.flash_attn_with_kvcache))
    for layer, shape in enumerate(shapes):
        for view in kv.views(layer):
            view.copy_(noise(*view.shape, seed=layer))
        sizes = (4, shape.kv_heads, shape.kv_heads)
        states = [noise(1, heads, 27, shape.k_dim, seed=heads).half() for heads in sizes]
        fields = {"window": None, "softcap": None} | extra
        call = Call(layer, *states, scale=0.3, sinks=None, bidirectional=False, unknown=(), **fields)
        expected = PagedBatch(kv, spans, CPU).attend(call)
        out = kernels.attend(kv, tables_of(spans, kv.page, CPU), call)
        torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)
    assert library.calls == [21, 21]


def test_what_it_is_not_asked(library: Library) -> None:
    """Float32, sinks, K and V of two sizes, wide heads, places that are not aligned: Triton's."""
    flash = Flash(library.flash_attn_with_kvcache)

    def can(dtype: torch.dtype, k_dim: int, v_dim: int, block_bytes: int, sinks: bool = False) -> bool:
        kv = KvView(
            torch.zeros(4 * block_bytes, dtype=torch.uint8), block_bytes, [LayerShape(1, k_dim, v_dim)], dtype
        )
        states = [torch.zeros(1, 1, 1, dim, dtype=dtype) for dim in (k_dim, k_dim, v_dim)]
        extra = torch.zeros(1) if sinks else None
        return flash.can(kv, Call(0, *states, 1.0, None, None, extra, bidirectional=False, unknown=()))

    assert can(torch.float16, 16, 16, 4096)
    assert not can(torch.float32, 16, 16, 4096)
    assert not can(torch.float16, 16, 16, 4096, sinks=True)
    assert not can(torch.float16, 16, 8, 4096)
    assert not can(torch.float16, 12, 12, 4096)
    assert not can(torch.float16, 512, 512, 4096)
    assert not can(torch.float16, 16, 16, 4104)


@pytest.mark.parametrize("careless", [False, True])
def test_models(
    careless: bool,
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model whose attention agrees runs on it, from graphs too, and draws what it draws without; where it
    reads pages of the service beyond what is written, Triton stays. Both can be seen."""
    directory, drawn = save_tiny(tmp_path / "m", num_hidden_layers=2), []
    with_it = replace(TRITON, flash=Flash(library.flash_attn_with_kvcache))
    library.careless = careless
    for number, kernels in enumerate((TRITON, with_it)):
        library.calls.clear()
        capsys.readouterr()
        monkeypatch.setattr(ops, "_kernels", kernels)
        recorder = Rerun()
        rig = recorder.rig = Rig(monkeypatch, tmp_path / f"cache{number}", recorder=recorder)
        rig.load("s", directory, dtype="float16")
        used = number == 1 and not careless
        shown = dict(rig.worker._resident["s"].operations())
        assert shown.get("attention (FlashAttention 3 for single tokens and prompts)", 0) == 2 * used
        assert ("attention of llama without FlashAttention 3" in capsys.readouterr().err) == (
            number and careless
        )
        rig.spoil(rig.free)
        library.calls.clear()
        admit = msg.Admit(1, tuple(range(3, 15)), 12, GREEDY)
        drawn.append([rig.step("s", [admit], [msg.Row(1, 0, 12, True, rig.blocks("s", 0, 16))]).tokens])
        for step in range(4):
            drawn[-1].append(rig.step("s", [], [msg.Row(1, 12 + step, 1, True)]).tokens)
        assert bool(library.calls) == used
        assert recorder.replayed == 3
    assert drawn[0] == drawn[1]

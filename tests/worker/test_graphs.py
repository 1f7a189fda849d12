"""Decode steps from graphs, with a stand-in that runs the captured function again on the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from seallmd.core import messages as msg
from seallmd.worker import graphs, main
from seallmd.worker.graphs import Uncapturable
from seallmd.worker.kv import Page, Span
from seallmd.worker.static_steps import DecodeShape, MixedShape, Shape, shape_for
from tests.worker.helpers import FAMILIES, Rig, Talk, plain, run_step, save_tiny


class Rerun:
    """As `graphs.Recorder`. Like a graph it knows weights by their addresses alone."""

    def __init__(self) -> None:
        self.rig: Rig | None = None
        self.captured = self.replayed = self.bytes_ = 0
        self.refusal = ""

    def capture(self, function: Callable[[], object]) -> graphs.Graph:
        if self.refusal:
            raise Uncapturable(self.refusal)
        self.captured += 1
        return _Again(self, function)

    def spent(self) -> int:
        return self.bytes_

    def weights(self) -> list[int]:
        assert self.rig is not None
        models = [resident.model for resident in self.rig.worker._resident.values()]
        return [parameter.data_ptr() for model in models for parameter in model.parameters()]


class _Again:
    def __init__(self, recorder: Rerun, function: Callable[[], object]) -> None:
        self._recorder, self._function = recorder, function
        self._weights = recorder.weights()

    def replay(self) -> None:
        assert self._recorder.weights() == self._weights, "a graph would read its weights where they were"
        self._recorder.replayed += 1
        self._function()


@pytest.fixture
def recorder() -> Rerun:
    return Rerun()


@pytest.fixture
def rig(recorder: Rerun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return make_rig(recorder, monkeypatch, tmp_path)


def make_rig(recorder: Rerun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **fields: Any) -> Rig:
    rig = recorder.rig = Rig(monkeypatch, tmp_path / "cache", recorder=recorder, **fields)
    return rig


def begin(rig: Rig, model: PreTrainedModel, count: int, first: int = 1, length: int = 5) -> list[Talk]:
    """Requests whose prompts have run, a step each."""
    talks = []
    for n in range(first, first + count):
        prompt = [(7 * n + 3 * i) % 90 + 3 for i in range(length + n)]
        talks.append(Talk(rig, n, "s", prompt))
        run_step(rig, model, [(talks[-1], len(prompt))])
    return talks


def decode(rig: Rig, model: PreTrainedModel, talks: list[Talk], steps: int) -> None:
    for _ in range(steps):
        run_step(rig, model, [(talk, 1) for talk in talks])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forward(family: str, rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """Logits and tokens of every family, in steps of any number of rows, across a growing block table."""
    model = plain(save_tiny(tmp_path / "m", family))
    rig.load("s", tmp_path / "m")
    talks = begin(rig, model, 3)
    decode(rig, model, talks, 3)
    decode(rig, model, talks[:1], 3)
    talks += begin(rig, model, 2, first=4, length=20)
    decode(rig, model, talks, 12)
    assert recorder.captured >= 3
    assert recorder.replayed >= 12


@pytest.mark.parametrize("kv_layout", ["merged", "split"])
def test_padding_disturbs_nobody(
    kv_layout: Any, recorder: Rerun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows that fill a step up write to the block behind the arena, and nowhere else; what other owners have
    left in free blocks is not read."""
    rig = make_rig(recorder, monkeypatch, tmp_path, kv_layout=kv_layout)
    model = plain(save_tiny(tmp_path / "m", "gemma2"))
    rig.load("s", tmp_path / "m")
    rig.spoil(rig.free)
    talks = begin(rig, model, 5)
    decode(rig, model, talks, 3)
    rig.spoil(rig.free)
    decode(rig, model, talks, 8)
    assert recorder.replayed >= 7
    untouched = rig.device.arena.view(-1, rig.block_bytes)[rig.free]
    assert bool((untouched == 255).all())
    assert rig.device.scratch * rig.block_bytes == rig.device.arena.numel()


def test_graphs_outlive_an_eviction(rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """Weights that come back to their former place are found there; at another place graphs are made anew."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    talks = begin(rig, model, 2)
    decode(rig, model, talks, 3)
    assert (recorder.captured, recorder.replayed) == (1, 2)

    copy = rig.sent["s"]
    rig.worker.handle(msg.DropWeights("s"))
    for extent in copy.extents:
        rig.device.arena[extent.arena_at : extent.arena_at + extent.bytes_] = 255
    rig.worker.handle(copy)
    while rig.worker.copying:
        rig.worker.advance()
    rig.take()
    decode(rig, model, talks, 2)
    assert (recorder.captured, recorder.replayed) == (1, 4)

    rig.copy_in("s", *rig.evict("s"))
    assert rig.sent["s"].extents != copy.extents
    decode(rig, model, talks, 4)
    assert (recorder.captured, recorder.replayed) == (2, 7)


def test_blocks_may_move(rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """Block tables are data of a graph, not part of it."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    talks = begin(rig, model, 2)
    decode(rig, model, talks, 3)
    old, new = talks[0].table[0], rig.free.pop()
    rig.worker.handle(msg.MoveBlocks((old,), (new,)))
    rig.spoil([old])
    talks[0].table[0] = new
    decode(rig, model, talks, 2)
    assert (recorder.captured, recorder.replayed) == (1, 4)


def test_what_cannot_be_captured_runs_without(
    rig: Rig, recorder: Rerun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step that finds out is right too, it is told once, and nobody tries again."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    talks = begin(rig, model, 2)
    recorder.refusal = "it waits for the device"
    decode(rig, model, talks, 3)
    recorder.refusal = ""
    decode(rig, model, talks, 3)
    assert recorder.captured == 0
    assert capsys.readouterr().err.count("run without graphs: it waits for the device") == 1


def prepare(rig: Rig) -> int:
    """Capture all that is captured ahead; how often that took."""
    times = 0
    while rig.worker.unprepared:
        rig.worker.prepare()
        times += 1
        assert times < 1000
    return times


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_likely_shapes_are_captured_ahead(
    family: str, rig: Rig, recorder: Rerun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first decode step of a model is replayed, and what was there before is neither read nor written."""
    monkeypatch.setattr(graphs, "_AHEAD_ROWS", (1, 2, 4))
    model = plain(save_tiny(tmp_path / "m", family))
    rig.load("s", tmp_path / "m")
    rig.spoil(rig.free)
    assert prepare(rig) == recorder.captured > 3
    assert bool((rig.device.arena.view(-1, rig.block_bytes)[rig.free] == 255).all())
    captured, talks = recorder.captured, begin(rig, model, 3)
    decode(rig, model, talks, 8)
    decode(rig, model, talks[:1], 3)
    assert (recorder.captured, recorder.replayed) == (captured, captured + 11)


def test_nothing_is_captured_ahead_at_the_cost_of_others(
    rig: Rig, recorder: Rerun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where it would push out graphs that steps have asked for, nor beyond the memory for graphs."""
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 3)
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    decode(rig, model, begin(rig, model, 3), 2)
    assert prepare(rig) == 2
    assert not rig.worker.unprepared
    recorder.bytes_ = 1 << 30
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 300)
    assert prepare(rig) == 1, "one that finds out"
    assert recorder.captured == 3


def test_what_cannot_run_ahead_harms_nobody(
    rig: Rig,
    recorder: Rerun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows that nobody asked for find no memory: nothing more is tried ahead, and steps get their graphs."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    mine = rig.worker._resident["s"].graphs
    with monkeypatch.context() as patched:
        patched.setattr(type(mine), "_advance", refuse_memory)
        assert prepare(rig) == 1
    assert "graphs of llama are not captured ahead any more: no memory" in capsys.readouterr().err
    assert not rig.worker.unprepared
    decode(rig, model, begin(rig, model, 2), 3)
    assert (recorder.captured, recorder.replayed) == (1, 2)


def test_only_a_worker_without_work_captures_ahead(rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """Through its loop: no graph while messages come, one after each pause, then it waits for ever."""
    model = save_tiny(tmp_path / "m")
    rig.load("s", model)
    told: list[tuple[float | None, int]] = []

    class Script:
        """Three messages, then pauses until nothing is left to do."""

        def get(self, patience: float | None) -> msg.Message | None:
            told.append((patience, recorder.captured))
            if len(told) <= 3:
                return msg.Ping()
            return None if patience is not None else msg.Shutdown()

    main._serve(Script(), rig.worker)  # type: ignore[arg-type]
    assert [captured for _, captured in told] == [0, 0, 0, *range(recorder.captured + 1)]
    assert all(patience == main._QUIET_SECONDS for patience, _ in told[:-1])
    assert recorder.captured > 3


def refuse_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory for so many rows")


def test_graphs_are_bounded(
    rig: Rig,
    recorder: Rerun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In number: the one unused for longest goes. In memory: no more are made."""
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    talks = begin(rig, model, 4)
    for count in (1, 2, 1, 4):
        decode(rig, model, talks[:count], 2)
    mine = rig.worker._resident["s"].graphs
    assert len(mine) == 2
    decode(rig, model, talks[:1], 1)
    assert recorder.captured == 3
    decode(rig, model, talks[:2], 2)
    assert recorder.captured == 4
    recorder.bytes_ = 1 << 30
    decode(rig, model, talks[:4], 3)
    assert recorder.captured == 4
    assert capsys.readouterr().err.count("all the memory that they may") == 1


def test_none_are_wanted(recorder: Rerun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`graphs = "0 B"` switches them off."""
    rig = make_rig(recorder, monkeypatch, tmp_path, graph_bytes=0)
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    decode(rig, model, begin(rig, model, 1), 3)
    assert recorder.captured == 0


def test_prompts_and_scores_run_in_the_ordinary_way(rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """A chunk beside single tokens is no decode step."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    (talk,) = begin(rig, model, 1)
    for number in range(3):
        other = Talk(rig, 50 + number, "s", [3, 4, 5])
        run_step(rig, model, [(talk, 1), (other, 3)])
    assert recorder.captured == 0


def test_rows_that_draw_nothing(rig: Rig, recorder: Rerun, tmp_path: Path) -> None:
    """The last token but one of a prompt, run alone, draws nothing; its neighbour's logits are its own."""
    model = plain(save_tiny(tmp_path / "m"))
    rig.load("s", tmp_path / "m")
    (talk,) = begin(rig, model, 1)
    slow = Talk(rig, 9, "s", list(range(3, 12)))
    for _ in range(6):
        run_step(rig, model, [(slow, 1), (talk, 1)])
    assert recorder.replayed == 5


ONE = (1,)


@pytest.mark.parametrize(
    ("tokens", "pages", "expected"),
    [
        (ONE, 1, DecodeShape(1, 4)),
        (ONE * 3, 5, DecodeShape(4, 16)),
        (ONE * 8, 16, DecodeShape(8, 16)),
        (ONE * 9, 17, DecodeShape(16, 64)),
        (ONE * 250, 1, DecodeShape(256, 4)),
        (ONE * 257, 1, None),
        ((2,), 1, MixedShape(16, 8, 4)),
        ((13, *ONE * 4), 5, MixedShape(32, 8, 16)),
        ((20, *ONE * 8), 1, MixedShape(32, 32, 4)),
        ((30, 60, *ONE * 38), 1, MixedShape(128, 128, 4)),
        ((129,), 1, None),
    ],
)
def test_shapes(tokens: tuple[int, ...], pages: int, expected: Shape | None) -> None:
    """Few shapes, little padding; of steps with prompts only small ones, and none in plain torch."""
    page = Page(16, 1)
    spans = [Span(0, n, 16 * pages, range(pages)) for n in tokens]
    assert shape_for(spans, page, 4, chunks=True) == expected
    if max(tokens) > 1:
        assert shape_for(spans, page, 4, chunks=False) is None


def test_logits_share_one_buffer() -> None:
    """All graphs leave their logits in one place; one that needs more gets a new place, and older graphs keep
    theirs."""
    pool = graphs.GraphPool(Rerun(), torch.device("cpu"), 1, print)
    small = pool.logits((2, 10), torch.float32)
    assert pool.logits((2, 10), torch.float16).data_ptr() == small.data_ptr()
    large = pool.logits((8, 10), torch.float32)
    assert large.data_ptr() != small.data_ptr()
    assert pool.logits((2, 10), torch.float32).data_ptr() == large.data_ptr()
    small.fill_(1)
    assert large.shape == (8, 10)

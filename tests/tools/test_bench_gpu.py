"""tools/bench_gpu.py on a CPU at a tiny size: on a GPU it must not fail for its own sake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seallmd.worker import ops
from seallmd.worker.device import Device
from tools import bench_gpu
from tools.bench_gpu import _SHAPES, main


class Rerun:
    """As `graphs.Recorder`: runs what was captured again."""

    captured = 0

    def capture(self, function: Callable[[], object]) -> Rerun:
        self.captured += 1
        graph = Rerun()
        graph.replay = function  # type: ignore[attr-defined]
        return graph

    def spent(self) -> int:
        return 0


def test_a_tiny_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs for every model, and all that is compared agrees, from graphs too."""
    ops.stop()
    recorders = []

    def make_recorder(_: Device) -> Rerun:
        recorders.append(Rerun())
        return recorders[-1]

    monkeypatch.setattr(bench_gpu, "make_recorder", make_recorder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code = main(["--device", "cpu", "--tiny"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "WRONG" not in out
    for name in _SHAPES:
        assert name.partition(" ")[2] in out
    assert len(recorders) == len(_SHAPES)
    assert all(recorder.captured >= 2 for recorder in recorders)
    assert out.count("100.0% the same tokens") == 2 * len(_SHAPES)


def test_one_figure_that_cannot_be_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others are printed all the same, and the exit code says that one is missing."""
    ops.stop()

    def refused(*_: object) -> float:
        raise SystemExit("bench_gpu: StepFailed")

    monkeypatch.setattr(bench_gpu.Bench, "prefill", refused)
    names = ["operations", "llama Llama-3.1-8B"]
    report = tmp_path / "report"
    code = main(["--device", "cpu", "--tiny", "--report", str(report), "--sections", *names])
    out = capsys.readouterr().out
    assert code == 1
    assert report.read_text().split() == ["good", "bad"]
    assert "prefill 16: FAILED, SystemExit in test_bench_gpu.py" in out
    assert "of host copies" in out
    assert "copies of KV right" in out

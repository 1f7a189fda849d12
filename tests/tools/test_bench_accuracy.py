"""Tests of tools/bench_accuracy.py: its arithmetic, and that float32 is what transformers computes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from seallmd.worker import ops
from tests.worker.helpers import save_tiny
from tools.bench_accuracy import Seen, common_prefix, compare, main, windows


def test_windows_and_prefixes() -> None:
    """Windows are full and do not overlap; a prefix ends with the first difference."""
    assert windows(list(range(10)), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(windows(list(range(100)), 4, 9)) == 9
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [9, 2, 3])] == [3, 1, 0]


def test_a_line_counts_against_float32() -> None:
    """Shares are of positions and of whole answers."""
    exact = Seen("exact", 10.0, [torch.tensor([1, 2, 3, 4])], [[1, 2], [3, 4]])
    other = Seen("other", 10.1, [torch.tensor([1, 2, 3, 9])], [[1, 2], [3, 5]])
    words = compare(other, exact).split()
    assert words == ["other", "10.1000", "+1.000%", "75.00%", "1", "of", "2", "1.5"]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command on a tiny model: float32 equals transformers' answers, and 16 bits are near."""
    text = tmp_path / "text"
    text.write_text("w5 w9 w31 w7 w80 w44 w12 w63 " * 8)
    model = save_tiny(tmp_path / "m")
    sizes = ["--window", "16", "--prompt", "8", "--new", "6", "--prompts", "3"]
    try:
        main([str(model), "--text", str(text), *sizes, "--dtypes", "float32", "bfloat16"])
    finally:
        ops.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(": 3 of 3 answers are those of the first line")
    perplexities = [float(line.split()[2]) for line in lines if ", compiled" in line or ", plain" in line]
    assert len(perplexities) == 2
    assert math.isclose(*perplexities, rel_tol=0.1)

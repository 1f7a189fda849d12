"""tools/bench_gpu.py on a CPU at a tiny size: on a GPU it must not fail for its own sake."""

from __future__ import annotations

import pytest
import torch

from seallmd.worker import ops
from tools.bench_gpu import _SHAPES, main


def test_a_tiny_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Every part runs for every model, and all that is compared agrees."""
    ops.stop()
    threads = torch.get_num_threads()
    try:
        code = main(["--device", "cpu", "--tiny"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "WRONG" not in out
    for name in _SHAPES:
        assert name.partition(" ")[2] in out

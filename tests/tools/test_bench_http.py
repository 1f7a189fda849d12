"""Tests of tools/bench_http.py: what it makes of step times, and a short run against a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.helpers import save_tiny
from tools.bench_http import Bench, busy_share


def test_busy_share() -> None:
    """Pauses between runs do not count, gaps between steps do."""
    steps = [(1.0, 0.5), (2.0, 0.5), (3.0, 1.0), (60.0, 0.5), (61.0, 1.0)]
    assert busy_share(steps) == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert busy_share([(1.0, 0.5), (1.5, 0.7)]) == 1.0  # clocks of two processes


def test_a_daemon_is_measured(tmp_path: Path) -> None:
    """Protects the client: every stream is read to its end, and the journal has the steps."""
    model = save_tiny(tmp_path / "m")
    bench = Bench(tmp_path / "d", model, tmp_path / "cache", "float32", 1)
    try:
        served = bench.ask([[5, 6, 7], [8, 9]], 4)
    finally:
        bench.end()
    assert len(served.answers) == 2
    assert all(0 < answer.first <= answer.whole <= served.seconds for answer in served.answers)
    assert len(bench.steps()) >= 4

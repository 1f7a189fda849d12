"""Figures on histories that are small enough for a pencil."""

from __future__ import annotations

import io
import json
import math
from array import array

import pytest
from rich.console import Console

from seallmd.sim import metrics
from seallmd.sim.metrics import Report, Served, Spread

ISOLATED: dict[str, metrics.Isolated] = {
    "a": lambda _prompt, output: 0.1 * output,
    "b": lambda _prompt, _output: 1.0,
    "idle": lambda _prompt, _output: 1.0,
}


def served(service: str, arrived: float, *times: float, error: str = "") -> Served:
    """A request that got a token at each of these times."""
    finished = times[-1] if times and not error else math.nan
    return Served(service, arrived, 10, len(times), array("d", times), finished, error)


@pytest.fixture
def run() -> Report:
    """Service a: latencies 0.4 and 1.0 of 2 tokens each; b: one of 3.0, one failure."""
    history = [
        served("a", 0.0, 0.3, 0.4),
        served("a", 1.0, 1.5, 2.0),
        served("b", 2.0, 4.0, 4.5, 5.0),
        served("b", 3.0, error="refused"),
    ]
    return metrics.report("test", history, ISOLATED, rate=0.8, utilisation=0.5, swaps=2, preemptions=0)


def test_means(run: Report) -> None:
    """Protects the definitions: ms per token, slowdown, and their mean over services."""
    a, b = run.services["a"], run.services["b"]
    assert a.ms_per_token.mean == pytest.approx((200 + 500) / 2)
    assert a.slowdown.mean == pytest.approx((2.0 + 5.0) / 2)
    assert b.slowdown.mean == pytest.approx(3.0)
    assert run.normalized_latency == pytest.approx((3.5 + 3.0) / 2)  # not the mean over requests
    assert run.overall.slowdown.mean == pytest.approx((2 + 5 + 3) / 3)
    assert run.seconds == pytest.approx(5.0)
    assert run.tokens_per_second == pytest.approx(7 / 5)


def test_first_tokens_and_gaps(run: Report) -> None:
    """Protects TTFT and inter-token latency; gaps never reach from one answer to the next."""
    assert run.services["a"].ttft_seconds.mean == pytest.approx((0.3 + 0.5) / 2)
    assert run.services["b"].inter_token_seconds.mean == pytest.approx(0.5)
    assert run.overall.inter_token_seconds.p99 == pytest.approx(0.5)


def test_attainment_counts_failures_as_missed(run: Report) -> None:
    """Protects the curve: a server that refuses must not look better for it."""
    assert run.overall.failed == 1
    assert run.overall.attainment[:5] == (0.0, 0.25, 0.5, 0.5, 0.75)
    assert run.overall.attainment[-1] == 0.75
    assert len(run.overall.attainment) == len(metrics.SCALES) == 20


def test_percentiles_are_nearest_rank() -> None:
    """Protects percentiles: always a value that occurred."""
    spread = Spread.of(list(range(1, 101)))
    assert (spread.p50, spread.p95, spread.p99) == (50, 95, 99)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
    assert math.isnan(Spread.of([]).p99)


def test_a_service_without_requests_changes_nothing(run: Report) -> None:
    """Protects the normalized latency from services that nobody asked."""
    assert run.services["idle"].requests == 0
    assert math.isnan(run.services["idle"].slowdown.mean)


def test_nothing_at_all() -> None:
    """Protects reports of runs where every request failed."""
    empty = metrics.report("none", [served("a", 0.0, error="x")], ISOLATED, rate=1.0)
    assert math.isnan(empty.normalized_latency)
    assert empty.overall.attainment[-1] == 0.0


def test_shown_as_json_and_tables(run: Report) -> None:
    """Protects the output: JSON without NaN (which is none), tables with every run and service."""
    decoded = json.loads(metrics.encode([run]), parse_constant=pytest.fail)
    assert decoded["reports"][0]["normalized_latency"] == pytest.approx(3.25)
    assert decoded["reports"][0]["services"]["idle"]["slowdown"]["mean"] is None
    console = Console(file=io.StringIO(), width=160)
    console.print(metrics.table_of_runs([run]), metrics.table_of_services(run))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3.25" in text
    assert "3/4" in text
    assert "75.0%" in text
    assert "idle" in text

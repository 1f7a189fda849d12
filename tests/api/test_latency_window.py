"""Latencies of the last minutes: right percentiles, and nothing is remembered for longer."""

from __future__ import annotations

import random

import pytest

from seallmd.api.latency_window import WINDOW_SECONDS, LatencyWindow, Targets


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_percentiles() -> None:
    """Within a twentieth of the exact ones, whatever their size."""
    clock, rng = Clock(), random.Random(3)
    window = LatencyWindow(clock)
    values = sorted(rng.lognormvariate(-2, 1.5) for _ in range(2000))
    for value in values:
        window.first_token("a", value)
    found = window.by_service()["a"].first_token
    assert found is not None
    exact = [values[999], values[1899], values[1979]]
    assert found == tuple(pytest.approx(value, rel=0.05) for value in exact)


def test_expiry() -> None:
    """After the window, everything is forgotten: sums of slots that went must not stay behind."""
    clock = Clock()
    window = LatencyWindow(clock)
    for _ in range(3):
        window.first_token("a", 0.1)
        window.next_token("a", 0.01)
        window.ended("a", met=True)
        clock.now += 90
    assert window.by_service()["a"].ended == 3
    clock.now += 50
    assert window.by_service()["a"].ended == 2
    clock.now += WINDOW_SECONDS
    assert window.by_service() == {}


def test_recent_is_shorter_than_the_window() -> None:
    """A sample's percentiles are of its own seconds."""
    clock = Clock()
    window = LatencyWindow(clock)
    window.next_token("a", 5.0)
    clock.now += 20
    window.next_token("b", 0.1)
    recent = window.recent(15).next_token
    assert recent is not None
    assert max(recent) < 0.2


@pytest.mark.parametrize(
    ("first", "each", "met"),
    [(1.9, 0.0, True), (2.1, 0.0, False), (0.1, 0.19, True), (0.1, 0.21, False)],
)
def test_targets(first: float, each: float, met: bool) -> None:
    """Both count."""
    assert Targets().met(first, each) is met


def test_ends() -> None:
    """Those that ended, and of these those that met their targets; failed ones apart."""
    window = LatencyWindow(Clock())
    window.ended("a", met=True)
    window.ended("a", met=False)
    window.failed("a")
    figures = window.by_service()["a"]
    assert (figures.met, figures.ended, figures.failed) == (1, 2, 1)

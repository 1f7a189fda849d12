"""Latencies of late: by service, bounded in number and time."""

from __future__ import annotations

from seallmd.runtime.latencies import WINDOW_REQUESTS, WINDOW_SECONDS, RecentLatencies


def test_percentiles_of_a_service() -> None:
    """The first token apart from the further ones; one token has no further ones."""
    recent = RecentLatencies()
    for number in range(100):
        recent.add("a", 1.0, first_seconds=number / 100, seconds=number / 100 + 0.9, tokens=10)
    recent.add("b", 1.0, 0.5, 0.5, 1)
    report = recent.report(2.0)
    assert (report["a"].requests, report["a"].first_p50, report["a"].first_p99) == (100, 0.5, 0.99)
    assert abs(report["a"].next_p50 - 0.1) < 1e-9
    assert (report["b"].first_p50, report["b"].next_p99) == (0.5, 0.0)


def test_what_is_long_ago_is_forgotten() -> None:
    """And so is what is too much."""
    recent = RecentLatencies()
    recent.add("a", 0.0, 9.0, 9.0, 1)
    for _ in range(WINDOW_REQUESTS + 5):
        recent.add("b", WINDOW_SECONDS, 0.1, 0.2, 2)
    report = recent.report(WINDOW_SECONDS + 1)
    assert "a" not in report
    assert report["b"].requests == WINDOW_REQUESTS

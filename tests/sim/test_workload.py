"""Traces and made-up arrivals have the rates, shares and lengths that were asked for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from seallmd.sim.models import SimError
from seallmd.sim.workload import (
    Arrival,
    Lengths,
    fitted,
    from_traces,
    popularity,
    read_trace,
    resized,
    synthetic,
)

SERVICES = ["a", "b", "c"]


def made(**changes: object) -> list[Arrival]:
    """A workload large enough for statistics."""
    fields: dict[str, object] = {"rate": 50.0, "seconds": 400.0, "alpha": 0.9, "seed": 1, **changes}
    return synthetic(SERVICES, **fields)  # type: ignore[arg-type]


def test_rates_follow_the_power_law() -> None:
    """Protects popularity: each service's count within five standard deviations of its share."""
    arrivals = made()
    for service, share in zip(SERVICES, popularity(3, 0.9), strict=True):
        expected = 20_000 * share
        assert abs(sum(a.service == service for a in arrivals) - expected) < 5 * expected**0.5
    assert [round(share, 3) for share in popularity(2, 1.0)] == [0.667, 0.333]


def test_lengths_have_the_means() -> None:
    """Protects the lognormal's parameters: sigma must not move the mean."""
    arrivals = made(lengths=Lengths(161, 337, sigma=0.9))
    assert np.mean([a.prompt for a in arrivals]) == pytest.approx(161, rel=0.04)
    assert np.mean([a.output for a in arrivals]) == pytest.approx(337, rel=0.04)
    assert min(min(a.prompt, a.output) for a in arrivals) >= 1


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gaps_vary_as_asked(cv: float) -> None:
    """Protects burstiness, at an unchanged rate."""
    times = [a.seconds for a in made(cv=cv) if a.service == "a"]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, abs=0.1)
    assert 1 / np.mean(gaps) == pytest.approx(50 * popularity(3, 0.9)[0], rel=0.1)


def test_seeds() -> None:
    """Protects repetition, and that a further service leaves the draws of the others alone."""
    assert made() == made()
    assert made() != made(seed=2)
    one = synthetic(["a"], rate=5, seconds=50, alpha=0.0, seed=1)
    two = synthetic(["a", "b"], rate=10, seconds=50, alpha=0.0, seed=1)
    assert one == [arrival for arrival in two if arrival.service == "a"]


def test_arrivals_are_in_order_and_in_time() -> None:
    """Protects the simulator's loop, which walks them once."""
    times = [arrival.seconds for arrival in made()]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 400


# ------------------------------------------------------------------------------------------- traces


def trace(*seconds: float, prompt: int = 10) -> list[Arrival]:
    """A trace with requests at these times."""
    return [Arrival(at, "", prompt, 5) for at in seconds]


def test_scaling_gives_the_rate_and_keeps_the_shape() -> None:
    """Protects bursts: time is compressed by one factor, nothing is thinned out."""
    rows = trace(0.0, 1.0, 1.5, 4.0, 8.0)
    arrivals = from_traces([rows], ["a"], rate=4.0, seconds=1.0, alpha=1.0, seed=0)
    assert [a.seconds for a in arrivals] == [0.0, 0.125, 0.1875, 0.5]  # eight times as fast


def test_a_short_trace_begins_again() -> None:
    """Protects long runs: every round has the same gaps."""
    rows = trace(0.0, 1.0, 3.0)  # then a mean gap of 1.5: a round takes 4.5
    arrivals = from_traces([rows], ["a"], rate=1.0, seconds=7.0, alpha=1.0, seed=0)
    assert len(arrivals) == 7
    factor = (2 * 4.5 + 1.0) / 7
    assert arrivals[3].seconds == pytest.approx(4.5 / factor)
    assert arrivals[-1].seconds == pytest.approx(9.0 / factor)


def test_each_service_has_its_own_trace() -> None:
    """Protects the assignment: as many traces as services, in order; both scaled by one factor."""
    traces = [trace(0.0, 2.0, 4.0, prompt=1), trace(0.0, 1.0, 2.0, 3.0, prompt=2)]
    arrivals = from_traces(traces, ["a", "b"], rate=5.0, seconds=1.0, alpha=1.0, seed=0)
    assert {(a.service, a.prompt) for a in arrivals} == {("a", 1), ("b", 2)}


def test_services_share_a_trace_by_the_power_law() -> None:
    """Protects the split of one trace: nothing is lost, shares are right."""
    rows = trace(*(n / 10 for n in range(10_000)))
    arrivals = from_traces([rows], SERVICES, rate=10.0, seconds=1000.0, alpha=0.9, seed=4)
    assert len(arrivals) == 10_000
    for service, share in zip(SERVICES, popularity(3, 0.9), strict=True):
        assert sum(a.service == service for a in arrivals) == pytest.approx(10_000 * share, rel=0.06)


def test_traces_are_read(tmp_path: Path) -> None:
    """Protects the file format; a trace cut out of the middle starts at 0."""
    path = tmp_path / "trace.csv"
    path.write_text("seconds,prompt_tokens,output_tokens\n7.5,374,44\n7.0,396,109\n")
    assert read_trace(path) == [Arrival(0.0, "", 396, 109), Arrival(0.5, "", 374, 44)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seconds,prompt_tokens\n1,2\n2,3\n",
        "seconds,prompt_tokens,output_tokens\n1,x,3\n2,3,4\n",
        "seconds,prompt_tokens,output_tokens\n1,2,3\n",
        "seconds,prompt_tokens,output_tokens\n1,2,0\n2,2,3\n",
        "seconds,prompt_tokens,output_tokens\n1,2\n2,3\n",
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    """Protects against figures from a broken file."""
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SimError, match=r"trace\.csv"):
        read_trace(path)


def test_requests_are_cut_to_a_context() -> None:
    """Protects runs of long traces on models with a short context."""
    assert fitted(Arrival(0, "a", 900, 50), 400) == Arrival(0, "a", 350, 50)
    assert fitted(Arrival(0, "a", 10, 900), 400) == Arrival(0, "a", 10, 200)
    assert fitted(Arrival(0, "a", 10, 20), 400) == Arrival(0, "a", 10, 20)


def test_lengths_are_scaled() -> None:
    """Protects runs on slow devices: prompt and answer shrink alike, and neither vanishes."""
    assert resized(Arrival(1.5, "a", 400, 30), 0.125) == Arrival(1.5, "a", 50, 4)
    assert resized(Arrival(1.5, "a", 3, 1), 0.125) == Arrival(1.5, "a", 1, 1)

"""The ring of samples and what it says happened between two of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from seallmd.api.history import History
from seallmd.api.latency_window import WINDOW_SECONDS, LatencyWindow
from tests.api.engine_double import FakeEngine, view


@pytest.fixture
def fake(model: Path) -> FakeEngine:
    return FakeEngine([view("m", model), view("young", None)], [5])


@pytest.fixture
def history(fake: FakeEngine) -> History:
    return History(fake.status, LatencyWindow(lambda: 0.0), wall_clock=lambda: 1e9)


async def told(history: History) -> list[tuple[str, str, str]]:
    last = history.happenings(0)[-1].number if history.happenings(0) else 0
    await history.take()
    return [(happening.kind, happening.service, happening.text) for happening in history.happenings(last)]


async def test_nothing_happens(history: History) -> None:
    """The first sample, and one after which nothing has changed, tell of nothing."""
    assert await told(history) == []
    assert await told(history) == []


async def test_swaps_between_two_samples(fake: FakeEngine, history: History) -> None:
    """A swap that is over before the next sample is told by its counter and its places."""
    fake.states["m"] = {"swaps_in": 1, "groups": ((0,),)}
    await history.take()
    fake.states["m"] = {"swaps_in": 2, "last_swap_seconds": 0.25, "groups": ((0, 1),)}
    assert await told(history) == [
        ("out", "m", "left device 0"),
        ("in", "m", "came in on devices 0+1 in 0.250 s"),
    ]
    fake.states["m"] = {"swaps_in": 2, "preemptions": 5, "groups": (), "reason": "no room"}
    assert await told(history) == [
        ("out", "m", "left devices 0+1"),
        ("failure", "m", "no room"),
        ("preemption", "m", "2 requests were preempted"),
    ]


async def test_devices_and_draining(fake: FakeEngine, history: History) -> None:
    """What concerns no service alone is told as well."""
    await history.take()
    fake.device_state, fake.draining = "lost", True
    assert [text for _, _, text in await told(history)] == [
        "takes no new requests: it is about to stop",
        "device 0 is lost",
    ]


async def test_bounds(fake: FakeEngine, history: History) -> None:
    """The past has an end, however long the daemon runs."""
    for swaps in range(2 * WINDOW_SECONDS):
        fake.states["m"] = {"swaps_in": swaps}
        await history.take()
    assert len(history.samples(0)) == WINDOW_SECONDS
    assert len(history.happenings(0)) == 200
    assert history.samples(history.latest - 2)[0].number == history.latest - 1

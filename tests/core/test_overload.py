"""More than can be served: refused early, by requests and by tokens, and nothing grows."""

from __future__ import annotations

import random

import pytest

from seallmd.core import events as ev
from tests.core.helpers import shape, world


def test_waiting_tokens_are_bounded_over_all_services() -> None:
    """One service's long prompts count for all; what was admitted ends; then there is room again."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(40,), max_waiting_tokens=200)
    for request in range(1, 31):
        recorder.arrive(request, "ab"[request % 2], (1,) * 40, 4)
    refused = [r for r, finish in recorder.finished.items() if finish.code == "overloaded"]
    assert 20 <= len(refused) < 30
    assert all(recorder.finished[r].retry_after > 0 for r in refused)
    waiting = sum(s.waiting_tokens for s in recorder.world.node.state.services.values())
    assert waiting <= 200
    recorder.world.run()
    for request in set(recorder.prompts) - set(refused):
        recorder.assert_output(request)
    recorder.arrive(100, "a", (1, 2), 4)
    recorder.world.run()
    recorder.assert_output(100)


def test_waiting_tokens_of_a_service_are_bounded() -> None:
    """What waits for one service keeps nobody from another."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(40,), service_tokens={"a": 100})
    for request in range(1, 21):
        recorder.arrive(request, "ab"[request % 2], (1,) * 40, 4)
    assert {recorder.prompts[r].service for r in recorder.finished} == {"a"}
    assert recorder.world.node.state.services["a"].waiting_tokens <= 100
    recorder.world.run()
    recorder.assert_output(1)


def test_a_prompt_above_the_limit_is_served_alone() -> None:
    """A limit below one context must not make long prompts impossible."""
    recorder = world({"a": shape()}, max_waiting_tokens=10)
    recorder.arrive(1, "a", (1,) * 40, 4)
    recorder.world.run()
    recorder.assert_output(1)


def test_ten_times_the_load_leaves_no_trace_of_the_refused() -> None:
    """The node's own books hold what was admitted, and nothing else."""
    recorder = world({"a": shape()}, arenas=(40,), max_waiting_tokens=400, check_every_event=False)
    state = recorder.world.node.state
    for request in range(1, 2001):
        recorder.arrive(request, "a", (request % 50, 2, 3), 10)
        assert len(state.requests) <= 400
    recorder.world.node.check()
    assert len(recorder.finished) > 1500
    recorder.world.run()
    assert not state.requests
    assert state.services["a"].waiting_tokens == 0


RATE, BURST_SECONDS = 20.0, 6.0  # requests per second that the devices bear easily; of ten times as many


def burst(services: tuple[str, ...], longest_wait: float) -> tuple[list[float], list[ev.Finish], float]:
    """Ten times the usual load after a while of it; of the burst: times to the first token of those who were
    served, those who were not, and how many were served per second."""
    recorder = world(
        {name: shape(context=200) for name in services},
        arenas=(400,),
        check_every_event=False,
        max_wait_seconds=dict.fromkeys(services, longest_wait),
        max_waiting_tokens=1 << 30,
    )
    there, draw = recorder.world, random.Random(1)
    first: dict[int, float] = {}
    ends: dict[int, tuple[ev.Finish, float]] = {}

    def observe(_event: ev.Event, actions: list[ev.Action]) -> None:
        for action in actions:
            if isinstance(action, ev.Emit):
                first.setdefault(action.request, there.now)
            elif isinstance(action, ev.Finish):
                ends[action.request] = (action, there.now)

    there._observe = observe
    arrived: list[float] = []

    def send(rate: float, seconds: float) -> None:
        at, end = there.now + draw.expovariate(rate), there.now + seconds
        while at < end:
            there.run(until=at)
            arrived.append(at)
            prompt = tuple(draw.choices(range(50), k=draw.randint(5, 40)))
            recorder.arrive(len(arrived), draw.choice(services), prompt, draw.randint(5, 60))
            at += draw.expovariate(rate)

    send(RATE / len(services), 15.0)
    before, began = len(arrived), there.now
    send(10 * RATE / len(services), BURST_SECONDS)
    there.run()
    served = [r for r in range(before + 1, len(arrived) + 1) if r in first]
    refused = [ends[r][0] for r in range(before + 1, len(arrived) + 1) if r not in first]
    seconds = max(ends[r][1] for r in served) - began
    return sorted(first[r] - arrived[r - 1] for r in served), refused, len(served) / seconds


@pytest.mark.parametrize("services", [("a",), ("a", "b", "c")])
def test_targets_of_those_who_are_admitted_hold_in_a_burst(services: tuple[str, ...]) -> None:
    """Who would wait too long is refused at once, and knows when to come again; the devices stay as busy."""
    times, refused, per_second = burst(services, longest_wait=2.0)
    assert times[int(0.5 * len(times))] < 2.0
    assert times[int(0.99 * len(times))] < 2 * 2.0
    assert all(finish.code == "overloaded" and finish.retry_after >= 1 for finish in refused)
    unlimited, nobody, at_most = burst(services, longest_wait=0.0)
    assert not nobody
    assert unlimited[int(0.5 * len(unlimited))] > 5 * times[int(0.5 * len(times))], "it was no overload"
    assert per_second > 0.9 * at_most

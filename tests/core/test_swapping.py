"""When one model makes room for another: what is worth more, how long anybody waits, what never leaves."""

from __future__ import annotations

import pytest

from seallmd.core import events as ev
from seallmd.core.estimate import swap_seconds
from seallmd.core.messages import StepDone
from seallmd.core.service import Stage
from seallmd.core.settings import PolicySettings, ReplacementSettings
from seallmd.core.worth import loss, waited
from seallmd.sim.world import Costs
from tests.core.helpers import Recorder, shape, world

ONE_FITS = (60,)  # blocks: a model has 40, and KV beside it
LARGE = shape(segments=(40 * 256,))
SLOW = Costs(copy_byte=2e-5)  # 0.2 s for a model of 40 blocks


def state_of(recorder: Recorder, name: str) -> str:
    status = recorder.world.node.status(recorder.world.now)
    return next(s.state for s in status.services if s.name == name)


def two(**options: object) -> Recorder:
    """Two models of which one fits; both have been there, so that it is known what a swap takes."""
    recorder = world({"a": LARGE, "b": LARGE}, ONE_FITS, costs=SLOW, **options)  # type: ignore[arg-type]
    for request, name in enumerate("ba", 1):
        recorder.arrive(request, name, (1,), 1)
        recorder.world.run()
    assert state_of(recorder, "a") == "resident"
    return recorder


def crowd(recorder: Recorder, service: str, count: int, first: int, tokens: int = 30) -> None:
    """So many requests at once."""
    for request in range(first, first + count):
        recorder.arrive(request, service, (request % 50, 1), tokens)


def keep_busy(recorder: Recorder, service: str, count: int, first: int, until: float) -> int:
    """So many requests of a service at every moment; the number of the next one."""
    world, number = recorder.world, first
    while world.now < until:
        open_ = sum(r.service == service for r in world.node.state.requests.values())
        for _ in range(count - open_):
            recorder.arrive(number, service, (number % 50, 1), 20)
            number += 1
        world.run(until=min(until, world.now + 0.02))
    return number


def seconds_until_resident(recorder: Recorder, service: str, busy: str, count: int) -> float:
    """How long a service takes to come in while another is kept busy."""
    began, number = recorder.world.now, 10_000
    while state_of(recorder, service) != "resident":
        number = keep_busy(recorder, busy, count, number, recorder.world.now + 0.02)
        assert recorder.world.now < began + 1000, "it never came in"
    return recorder.world.now - began


@pytest.mark.parametrize(("waiters", "there"), [(20, 1), (1, 4)])
def test_it_comes_in_when_it_is_worth_more_than_what_leaves(waiters: int, there: int) -> None:
    """Many waiters push out a light resident at once; a single one has to wait for a busy one, but comes."""
    recorder = two(min_residency_swaps=0.0, patience_seconds=1000.0)
    number = keep_busy(recorder, "a", there, 100, recorder.world.now + 1.0)
    crowd(recorder, "b", waiters, first=number + 1000, tokens=5)
    took = seconds_until_resident(recorder, "b", "a", there)
    copy = recorder.world.node.state.services["b"].last_swap_seconds
    lost = there * 2 * copy  # request-seconds of those who run: away for two swaps
    if waiters > there:
        assert took <= lost / waiters + 3 * copy, "a crowd waited for one"
    else:
        assert lost / waiters <= took < 20, "one outweighed several, or waited for ever"
    recorder.world.run()


@pytest.mark.parametrize("importance", [{"b": 8.0}, {"a": 0.125}])
def test_importance_weighs_both_sides(importance: dict[str, float]) -> None:
    """Protects the setting: one waiter that matters eight times as much is as good as eight."""
    took = []
    for weights in (importance, {}):
        recorder = two(min_residency_swaps=0.0, patience_seconds=1000.0, importance=weights)
        number = keep_busy(recorder, "a", 4, 100, recorder.world.now + 1.0)
        crowd(recorder, "b", 1, first=number + 1000, tokens=5)
        took.append(seconds_until_resident(recorder, "b", "a", 4))
        recorder.world.run()
    copy = recorder.world.node.state.services["b"].last_swap_seconds
    assert took[0] - copy < (took[1] - copy) / 3, "it was not worth more"


def test_nobody_waits_for_a_swap_longer_than_patience() -> None:
    """However much those lose who have to leave: after `patience_seconds` they are asked."""
    patience = 0.5
    recorder = two(min_residency_swaps=0.0, patience_seconds=patience)
    services = recorder.world.node.state.services
    services["a"].last_swap_seconds = 1000.0  # as if the way back were endless
    number = keep_busy(recorder, "a", 10, 100, recorder.world.now + 1.0)
    crowd(recorder, "b", 1, first=number + 1000, tokens=5)
    took = seconds_until_resident(recorder, "b", "a", 10)
    assert took >= patience
    assert took <= patience + 2 * services["b"].last_swap_seconds + 0.3
    recorder.world.run()


@pytest.mark.parametrize(("tokens", "stay"), [(3, 1.0), (40, 5.0)])
def test_alternating_demand_does_not_thrash(tokens: int, stay: float) -> None:
    """Two models in demand all the time and room for one: each stays for its time, and all is served.

    A busy one stays for as many swaps as are set, one that is idle between requests for one.
    """
    swaps_of_stay = 5.0
    recorder = two(min_residency_swaps=swaps_of_stay, patience_seconds=10.0)
    began, seconds, number = recorder.world.now, 20.0, 100
    before = sum(s.swaps_in for s in recorder.world.node.state.services.values())
    while recorder.world.now < began + seconds:
        number += 1
        recorder.arrive(number, "ab"[number % 2], (number % 50, 1), tokens)
        recorder.world.run(until=recorder.world.now + 0.05)
    recorder.world.run()
    swaps = sum(s.swaps_in for s in recorder.world.node.state.services.values()) - before
    copy = min(s.last_swap_seconds for s in recorder.world.node.state.services.values())
    assert 4 <= swaps <= (recorder.world.now - began) / ((1 + stay) * copy) + 2
    for request in recorder.prompts:
        recorder.assert_output(request)


def test_one_client_that_alternates_waits_for_copies_alone() -> None:
    """Who is there has nothing to do: nobody is spared by keeping the newcomer waiting."""
    recorder = two()
    for number in range(100, 120):
        began = recorder.world.now
        recorder.arrive(number, "ba"[number % 2], (number % 50, 1), 1)
        while number not in recorder.finished:
            recorder.world.step()
        copy = recorder.world.node.state.services["a"].last_swap_seconds
        assert recorder.world.now - began <= 2.1 * copy, "it stayed for longer than a swap takes"
        recorder.assert_output(number)


def test_a_first_coming_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds a module tree too: once a service has come back somewhere, that is what a swap takes."""
    recorder = two()
    state = recorder.world.node.state
    service = state.services["b"]
    assert swap_seconds(state, service) == service.last_swap_seconds, "nothing better is known"
    crowd(recorder, "b", 1, first=100)
    recorder.world.run()
    back = swap_seconds(state, service)
    assert back == service.last_swap_seconds
    crowd(recorder, "a", 1, first=200)
    recorder.world.run()
    service.former.clear()  # as after a new start of the worker
    monkeypatch.setattr(Costs, "copy", lambda *_: 2 * back)
    crowd(recorder, "b", 1, first=300)
    recorder.world.run()
    assert service.last_swap_seconds > 1.9 * back
    assert swap_seconds(state, service) == back


def test_clients_that_ask_again_at_once_keep_their_model_for_a_stay() -> None:
    """One client for each of two models, each with a request as soon as it has its answer: the moments
    between are no reason to swap."""
    recorder = two()
    world, number = recorder.world, 100
    began, last = world.now, dict.fromkeys("ab", 0)
    before = sum(s.swaps_in for s in world.node.state.services.values())
    while world.now < began + 20:
        for name in "ab":
            if not last[name] or last[name] in recorder.finished:
                number += 1
                last[name] = number
                recorder.arrive(number, name, (number % 50, 1), 5)
        world.run(until=world.now + 0.002)
    swaps = sum(s.swaps_in for s in world.node.state.services.values()) - before
    assert 4 <= swaps < (number - 100) / 10
    world.run()
    for request in range(101, number + 1):
        recorder.assert_output(request)


def test_waiters_share_one_swap_and_are_counted_together() -> None:
    """All who wait while it comes are served by that one copy; so is who arrives on the way."""
    recorder = two()
    crowd(recorder, "b", 10, first=100)
    while state_of(recorder, "b") == "absent":
        recorder.world.step()
    crowd(recorder, "b", 10, first=200)
    recorder.world.run()
    assert recorder.world.node.state.services["b"].swaps_in == 2
    for request in (*range(100, 110), *range(200, 210)):
        recorder.assert_output(request)


def test_pinned_services_never_leave_and_the_newcomer_hears_it() -> None:
    """All there is is pinned: the request fails with the reason, at once, and nobody moves."""
    recorder = world({"a": LARGE, "b": LARGE}, ONE_FITS, pinned=("a",))
    began = recorder.world.now
    crowd(recorder, "b", 30, first=1)
    recorder.world.run()
    assert {recorder.finished[request].status for request in range(1, 31)} == {503}
    assert all("pinned" in recorder.finished[request].error for request in range(1, 31))
    assert recorder.world.now - began < PolicySettings().patience_seconds
    assert state_of(recorder, "a") == "resident"
    assert recorder.world.node.state.services["a"].swaps_in == 1


def test_a_busy_pinned_service_in_the_middle() -> None:
    """It leaves blocks enough, but no run of them is long enough: that is told though it never pauses."""
    models = {"x": shape(segments=(20 * 256,)), "p": shape(), "y": shape(segments=(42 * 256,))}
    recorder = world(models, (64,), replacement=ReplacementSettings(enabled=False))
    for request, name in enumerate("xp", 1):
        recorder.arrive(request, name, (1,), 3)
        recorder.world.run()
    recorder.world.happen(ev.PinWanted(1, "p"))
    recorder.world.happen(ev.EvictWanted(2, "x"))
    recorder.world.run()
    (replica,) = recorder.world.node.state.services["p"].replicas
    assert replica.starts[0][0] == 20
    recorder.arrive(3, "p", (2,), 60)
    recorder.arrive(4, "y", (1,), 3)
    while 4 not in recorder.finished:
        assert recorder.world.step()
    assert "pinned services leave no room" in recorder.finished[4].error
    assert 3 not in recorder.finished
    recorder.world.run()
    recorder.assert_output(3)


def test_others_keep_stepping_while_a_model_is_copied() -> None:
    """The copy is long: a resident that is not in its way answers all the while."""
    services = {"a": shape(), "b": shape(segments=(400 * 256,))}
    recorder = world(dict(services), (460,), costs=Costs(copy_byte=5e-6))
    crowd(recorder, "a", 4, first=1, tokens=60)
    recorder.world.run(until=recorder.world.now + 0.1)
    steps: list[bool] = []
    follow = recorder.observe

    def observe(event: ev.Event, actions: list[ev.Action]) -> None:
        if isinstance(event, ev.FromDevice) and isinstance(event.message, StepDone):
            steps.append(state_of(recorder, "b") == "copying")
        follow(event, actions)

    recorder.world._observe = observe
    recorder.arrive(100, "b", (1,), 2)
    recorder.world.run()
    assert sum(steps) > 3, "nothing stepped beside the copy"
    for request in (1, 2, 3, 4, 100):
        recorder.assert_output(request)


def test_worth_in_request_seconds() -> None:
    """The unit of the rule: who is there, times how long they would be without their model."""
    recorder = two()
    state = recorder.world.node.state
    a, b = state.services["a"], state.services["b"]
    (replica,) = a.replicas
    a.arrivals.add(-a.arrivals.value(state.now) * a.arrivals.window_seconds, state.now)
    a.last_swap_seconds, b.last_swap_seconds, b.swaps_in = 3.0, 2.0, 1
    assert loss(state, replica, b) == pytest.approx(0.0)
    recorder.arrive(50, "a", (1,), 20)
    assert loss(state, replica, b) == pytest.approx(5.0 * (1 + 5.0 * a.arrivals.value(state.now)))
    recorder.arrive(51, "b", (1,), 2)
    recorder.arrive(52, "b", (1,), 2)
    assert waited(b, state.now + 3.0) == pytest.approx(2 * 3.0)
    recorder.world.run()


def test_those_who_wait_inherit_the_room_that_is_being_made() -> None:
    """Where each client gives up before the drain is over, its successors would else begin from the start."""
    recorder = two(min_residency_swaps=0.0, patience_seconds=1000.0)
    crowd(recorder, "a", 2, first=100, tokens=60)
    crowd(recorder, "b", 20, first=200, tokens=5)
    (replica,) = recorder.world.node.state.services["a"].replicas
    while replica.stage is not Stage.DRAINING:
        assert recorder.world.step()
    ends = replica.drain_until
    assert ends is not None
    for request in range(200, 219):
        recorder.world.happen(ev.Cancelled(request))
        assert (replica.stage, replica.drain_until) == (Stage.DRAINING, ends)
    recorder.world.happen(ev.Cancelled(219))
    assert replica.stage is Stage.RESIDENT, "nobody waits any more"
    crowd(recorder, "b", 1, first=300, tokens=5)
    recorder.world.run()
    for request in (100, 101, 300):
        recorder.assert_output(request)


def test_one_that_an_operator_lets_finish_is_hurried_once_another_is_asked_for() -> None:
    """An evict has no deadline; whoever waits for the room must not have to wait longer for that."""
    limits, waited_for = {"min_residency_swaps": 0.0, "patience_seconds": 1.0}, list[float]()
    for evicted in (False, True):
        slow_steps = Costs(copy_byte=2e-5, step_fixed=0.1)
        recorder = world({"a": LARGE, "b": LARGE}, ONE_FITS, costs=slow_steps, **limits)
        crowd(recorder, "a", 1, first=100, tokens=60)
        recorder.world.run(until=recorder.world.now + 1.0)
        if evicted:
            recorder.world.happen(ev.EvictWanted(1, "a"))
        began = recorder.world.now
        crowd(recorder, "b", 1, first=200, tokens=5)
        while 200 not in recorder.finished:
            assert recorder.world.step()
        waited_for.append(recorder.world.now - began)
        recorder.world.run()
        recorder.assert_output(100)
    assert waited_for[0] < 3.0, "it waited until all had run to its end"
    assert waited_for[1] <= waited_for[0], waited_for

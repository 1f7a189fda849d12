"""Plans in a running node: made from what it has seen, carried out beside its work, given up if blocked."""

from __future__ import annotations

from collections import deque

from seallmd.core import events as ev
from seallmd.core.plan import Plan
from seallmd.core.settings import ReplacementSettings
from seallmd.core.status import ServiceStatus
from seallmd.core.transition import Bring, Drop
from seallmd.sim.world import Costs
from tests.core.helpers import Recorder, shape, world

EAGER = ReplacementSettings(min_interval_seconds=5.0, max_interval_seconds=20.0)


def status_of(recorder: Recorder, name: str) -> ServiceStatus:
    return next(s for s in recorder.world.node.status(recorder.world.now).services if s.name == name)


def crowded(**options: object) -> Recorder:
    """Two busy services on device 0 and nothing on device 1: device 1 was down when they came in."""
    services = {"a": shape(), "b": shape(), "c": shape(segments=(4096,))}
    recorder = world(dict(services), (200, 200), replicate=False, **options)  # type: ignore[arg-type]
    recorder.world.devices[1].kill(restart_after=2.0)
    recorder.arrive(1, "a", (1,), 2)
    recorder.arrive(2, "b", (1,), 2)
    recorder.world.run(until=recorder.world.now + 3.0)
    assert status_of(recorder, "a").devices == status_of(recorder, "b").devices == (0,)
    return recorder


def keep_busy(recorder: Recorder, seconds: float) -> None:
    """Both services have requests all the time."""
    number, end = 1000, recorder.world.now + seconds
    while recorder.world.now < end:
        for service in ("a", "b"):
            for _ in range(3):
                number += 1
                recorder.arrive(number, service, (number % 50, 3), 40)
        recorder.world.run(until=recorder.world.now + 0.5)
    recorder.world.run()
    for request in range(1001, number + 1):
        recorder.assert_output(request)


def test_two_busy_services_are_moved_apart() -> None:
    """Regret grows while they crowd one device; then one moves, and not a token is lost by it."""
    recorder = crowded(replacement=EAGER)
    keep_busy(recorder, 60.0)
    places = {status_of(recorder, name).devices for name in ("a", "b")}
    assert {device for place in places for device in place} == {0, 1}, recorder.notes
    assert any("better plan" in note for note in recorder.notes)


def test_without_replacement_they_stay() -> None:
    """The baseline can be switched on."""
    recorder = crowded(replacement=ReplacementSettings(enabled=False))
    keep_busy(recorder, 60.0)
    assert status_of(recorder, "a").devices == status_of(recorder, "b").devices == (0,)


def test_an_idle_node_makes_no_plans() -> None:
    """Nothing to do means no wake-ups at all: virtual time comes to its end."""
    recorder = crowded(replacement=EAGER)
    recorder.world.run()
    assert recorder.world.node.next_wakeup() is None


def test_what_an_operator_evicted_is_left_out() -> None:
    """However much was asked of it before: nobody but a client or an operator brings it back."""
    recorder = crowded(replacement=EAGER)
    keep_busy(recorder, 10.0)
    recorder.world.happen(ev.EvictWanted(1, "b"))
    recorder.world.run()
    for _ in range(40):
        recorder.arrive(5000 + _, "a", (_, 1), 30)
        recorder.world.run(until=recorder.world.now + 1.0)
    assert status_of(recorder, "b").state == "absent"


def test_a_pinned_service_stays_where_it_is() -> None:
    """It may be in a bad place; the other one is moved."""
    recorder = crowded(replacement=EAGER, pinned=("a",))
    place = status_of(recorder, "a").devices
    keep_busy(recorder, 60.0)
    assert set(place) <= set(status_of(recorder, "a").devices)
    assert set(status_of(recorder, "b").devices) - set(place)


def test_a_plan_whose_way_is_blocked_is_given_up() -> None:
    """The operator evicts what is to be moved: the plan ends, nothing waits for it."""
    recorder = crowded(replacement=EAGER)
    node = recorder.world.node
    number = 2000
    while not any("better plan" in note for note in recorder.notes):
        number += 2
        recorder.arrive(number, "a", (number % 50,), 40)
        recorder.arrive(number + 1, "b", (number % 50,), 40)
        recorder.world.run(until=recorder.world.now + 0.5)
    for ticket, name in enumerate(("a", "b"), 1):
        recorder.world.happen(ev.EvictWanted(ticket, name, now=True))
    recorder.world.run()
    assert recorder.answers == {1: "", 2: ""}
    assert status_of(recorder, "a").state == status_of(recorder, "b").state == "absent"
    assert node.next_wakeup() is None


def test_the_plan_is_told() -> None:
    """What `seallmctl plan` shows: where services are, where they would be better, regret and cost."""
    recorder = crowded(replacement=EAGER)
    for number in range(3000, 3060):
        recorder.arrive(number, "ab"[number % 2], (number % 50,), 40)
        recorder.world.run(until=recorder.world.now + 0.15)
    status = recorder.world.node.plan_status(recorder.world.now)
    assert status is not None
    assert status.current == Plan({"a": ((0,),), "b": ((0,),), "c": ()})
    assert {s.service for s in status.services} == {"a", "b", "c"}
    assert status.regret >= 0
    assert status.cost >= 0


def moving(**options: object) -> Recorder:
    """A crowded node that has just begun to move a service from device 0 to device 1."""
    recorder = crowded(replacement=EAGER, **options)
    number = 2000
    while not any("better plan" in note for note in recorder.notes):
        number += 2
        recorder.arrive(number, "a", (number % 50,), 40)
        recorder.arrive(number + 1, "b", (number % 50,), 40)
        recorder.world.run(until=recorder.world.now + 0.1)
    return recorder


def all_is_served(recorder: Recorder) -> None:
    """Both services answer, and every request that did not fail by a fault of its device has its tokens."""
    for request, name in ((9001, "a"), (9002, "b")):
        recorder.arrive(request, name, (1, 2), 5)
    recorder.world.run()
    for request, finish in recorder.finished.items():
        if finish.code != "worker_lost":
            recorder.assert_output(request)
    assert recorder.prompts.keys() == recorder.finished.keys()


def test_a_move_whose_copy_fails_is_abandoned_without_loss() -> None:
    """The one that was to move has not left: nobody notices but the operator."""
    recorder = moving(costs=Costs(copy_byte=5e-4))
    recorder.world.devices[1].fail_copies = 1
    recorder.world.run(until=recorder.world.now + 1.0)
    assert any("the plan is given up: it could not come" in note for note in recorder.notes)
    assert status_of(recorder, "a").devices == status_of(recorder, "b").devices == (0,)
    all_is_served(recorder)


def test_a_move_whose_device_is_lost_is_abandoned() -> None:
    """Half way to device 1, device 1 dies: requests go on where they were."""
    recorder = moving(costs=Costs(copy_byte=5e-4))
    recorder.world.devices[1].kill(restart_after=1.0)
    assert any("the plan is given up" in note for note in recorder.notes)
    assert status_of(recorder, "a").devices == status_of(recorder, "b").devices == (0,)
    all_is_served(recorder)


def test_a_move_stops_half_way_when_demand_has_changed() -> None:
    """After each step it is asked whether the rest is still worth it; who was to leave then stays."""
    recorder = moving(costs=Costs(copy_byte=5e-4))
    planner = recorder.world.node._planner
    assert planner._replacement is not None
    planner._replacement._best = planner._current()  # as if by now the best were what there was before
    recorder.world.run(until=recorder.world.now + 3.0)
    assert any("what is asked for has changed" in note for note in recorder.notes)
    assert not any(r.leaving for s in recorder.world.node.state.services.values() for r in s.replicas)
    all_is_served(recorder)


def test_what_left_for_what_never_came_comes_back() -> None:
    """A step that made a service leave is taken back when the step that it was for cannot be made."""
    services = {"a": shape(segments=(40 * 256,)), "b": shape(segments=(40 * 256,))}
    recorder = world(dict(services), (60,), preload=("a",), replacement=EAGER)
    node = recorder.world.node
    planner, state = node._planner, node.state
    planner._begin()
    state.planned = {"a": ((0,),), "b": ((0,),)}
    planner._steps = deque([Drop("a", (0,)), Bring("b", (0,))])
    planner._holds = lambda: True  # type: ignore[method-assign]
    planner._begin_step()
    recorder.world.devices[0].fail_copies = 1
    recorder.world.happen(ev.Tick())
    recorder.world.run()
    assert any("given up: it could not come" in note for note in recorder.notes), recorder.notes
    assert status_of(recorder, "a").state == "resident"


def searched(recorder: Recorder, services: str, seconds: float) -> list[Plan]:
    """The plans that are found while the services have requests all the time."""
    number, end = 1000, recorder.world.now + seconds
    while recorder.world.now < end:
        for service in services:
            number += 1
            recorder.arrive(number, service, (number % 50,), 10)
        recorder.world.run(until=recorder.world.now + 0.3)
    return [event.plan for _, event in recorder.world.history if isinstance(event, ev.PlanFound)]


def test_groups_that_a_service_may_come_in_on_are_not_all_its_own() -> None:
    """Several allowed groups are a choice. Plans took them for an order to be on each, and had no room."""
    large = shape(segments=(60 * 256,))
    recorder = world(
        {"a": large, "b": large, "c": large},
        (100, 100, 100),
        groups={"a": ((0,), (1,), (2,))},
        replacement=EAGER,
    )
    plan = searched(recorder, "abc", 30.0)[-1]  # the first is made before anybody has asked
    assert all(len(plan.of(service)) == 1 for service in "abc")


def test_allowed_groups_may_overlap() -> None:
    """Nothing was planned any more for anybody, as no device could be in two groups of one service."""
    recorder = world(
        {"g": shape(ranks=(2,)), "b": shape(), "c": shape()},
        (100, 100, 100),
        groups={"g": ((0, 1), (1, 2))},
        tensor_parallel={"g": 2},
        replacement=EAGER,
    )
    assert searched(recorder, "gbc", 30.0)

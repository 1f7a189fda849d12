"""Groups: services that may not be on one device are not, and yet all are served."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core.placement import place
from seallmd.core.plan import Machine, Plan, broken
from seallmd.core.settings import GroupSettings, ReplacementSettings
from seallmd.core.sharing import Sharing
from seallmd.core.transition import apply, steps
from tests.core.helpers import Recorder, shape, world
from tests.core.test_placement import GIB, demand

MODELS = {"a": shape(), "b": shape(), "c": shape()}


def beside(recorder: Recorder) -> set[frozenset[str]]:
    """Who is on a device with whom."""
    return {frozenset(device.replicas) for device in recorder.world.node.state.devices.values()}


def test_what_groups_say() -> None:
    """Members among themselves, and with others; no group, no rule."""
    apart = Sharing((GroupSettings(services=("a", "b"), share_members=False),)).apart
    assert apart("a", "b")
    assert apart("b", "a")
    assert not apart("a", "c")
    assert not apart("a", "a")
    alone = Sharing((GroupSettings(services=("a", "b"), share_others=False),)).apart
    assert not alone("a", "b")
    assert alone("a", "c")
    assert not alone("c", "d")
    assert not Sharing(()).apart("a", "b")


@pytest.mark.parametrize("preload", [(), ("a", "b", "c")])
def test_services_apart_take_different_devices(preload: tuple[str, ...]) -> None:
    """Though one device could hold them all."""
    rule = (GroupSettings(services=("a", "b"), share_members=False),)
    recorder = world(MODELS, arenas=(90, 90), sharing=rule, preload=preload, replicate=False)
    for request, name in enumerate("abcabc", 1):
        recorder.arrive(request, name, (request,), 9)
    recorder.world.run()
    for request in range(1, 7):
        recorder.assert_output(request)
    together = beside(recorder)
    assert not any({"a", "b"} <= names for names in together)
    assert set().union(*together) == {"a", "b", "c"}


def test_on_one_device_they_take_turns() -> None:
    """A busy one drains for the other, an idle one leaves at once, although there is room for both."""
    rule = (GroupSettings(services=("a",), share_others=False),)
    recorder = world(MODELS, arenas=(90,), sharing=rule, patience_seconds=0.2, min_residency_swaps=2.0)
    for request in range(1, 31):
        recorder.arrive(request, "abc"[request % 3], (request % 50,), 9)
        recorder.world.run(until=recorder.world.now + 0.05)
    recorder.world.run()
    for request in range(1, 31):
        recorder.assert_output(request)


def test_a_pinned_service_keeps_strangers_out() -> None:
    """The newcomer is refused with the reason; it does not wait for ever."""
    rule = (GroupSettings(services=("a", "b"), share_members=False),)
    recorder = world(MODELS, arenas=(90,), sharing=rule, pinned=("a",))
    recorder.arrive(1, "b", (1,), 3)
    recorder.arrive(2, "c", (1,), 3)
    recorder.world.run(until=60.0)
    assert "no room for it" in recorder.finished[1].error
    recorder.assert_output(2)


def test_replicas_keep_apart_too() -> None:
    """A busy service is not multiplied onto a device where it may not be."""
    rule = (GroupSettings(services=("a", "b"), share_members=False),)
    recorder = world(MODELS, arenas=(120, 120), sharing=rule, replicate_seconds=0.1, max_rows=4)
    recorder.world.happen(ev.LoadWanted(1, "b"))
    for request in range(1, 41):
        recorder.arrive(request, "a", (request % 50,), 30)
    recorder.world.run()
    assert not any({"a", "b"} <= names for names in beside(recorder))
    for request in range(1, 41):
        recorder.assert_output(request)


def test_plans_keep_them_apart() -> None:
    """The search never puts them on one device, and the way to a plan does not lead over that."""
    names = ("a", "b", "c", "d")
    demands = [demand(name, rate=2.0) for name in names]
    pairs = (("a", "b"), ("b", "a"), ("c", "d"), ("d", "c"), ("a", "unknown"), ("unknown", "a"))
    free = Machine(arena_bytes=(80 * GIB,) * 2, copy_bytes_per_second=1e9)
    machine = replace(free, apart=pairs)
    plan = place(demands, machine)
    assert not broken(plan, demands, machine)
    assert all(plan.of(name) for name in names), "somebody was left out for no reason"
    others = Plan({"a": ((0,),), "b": ((1,),), "c": ((0,),), "d": ((1,),)})
    swapped = Plan({"a": ((1,),), "b": ((0,),), "c": ((0,),), "d": ((1,),)})
    assert "may not be on one device" in broken(Plan({"a": ((0,),), "b": ((0,),)}), demands, machine)
    state = others
    for step in steps(others, swapped, demands, machine):
        state = apply(state, step)
        assert not broken(state, demands, machine)
    assert state.same(swapped)
    lit = steps(others, swapped, demands, free)
    assert len(lit) <= len(steps(others, swapped, demands, machine))


def test_a_running_node_plans_with_groups() -> None:
    """A plan is found, and obeys."""
    rule = (GroupSettings(services=("a", "b"), share_members=False),)
    often = ReplacementSettings(min_interval_seconds=1.0, max_interval_seconds=1.0)
    recorder = world(MODELS, arenas=(90, 90), sharing=rule, replacement=often)
    for request in range(1, 200):
        recorder.arrive(request, "abc"[request % 3], (request % 50,), 9)
        recorder.world.run(until=recorder.world.now + 0.1)
        assert not any({"a", "b"} <= names for names in beside(recorder))
    plan = recorder.world.node.plan_status(recorder.world.now)
    assert plan is not None
    assert all(plan.best.of(name) for name in "abc")
    recorder.world.run()


def test_placements_that_contradict_groups_are_not_planned() -> None:
    """Both on the one device that each may be on, and never together: they take turns, and all is served."""
    rule = (GroupSettings(services=("a", "b"), share_members=False),)
    recorder = world(
        MODELS, arenas=(90, 90), sharing=rule, groups={"a": ((0,),), "b": ((0,),)}, patience_seconds=0.2
    )
    for request in range(1, 60):
        recorder.arrive(request, "abc"[request % 3], (request % 50,), 9)
        recorder.world.run(until=recorder.world.now + 0.3)
    recorder.world.run()
    for request in range(1, 60):
        recorder.assert_output(request)

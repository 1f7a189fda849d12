"""Replicas on several devices: every rank has its part, and all of them step, come and go together."""

from __future__ import annotations

import pytest

from seallmd.core import events as ev
from seallmd.core.arena import Arena
from seallmd.core.messages import CopyIn, Step
from seallmd.core.ranks import Ranks
from seallmd.core.settings import ReplacementSettings
from seallmd.core.status import ServiceStatus
from tests.core.helpers import Recorder, shape, world


def status_of(recorder: Recorder, name: str) -> ServiceStatus:
    return next(s for s in recorder.world.node.status(recorder.world.now).services if s.name == name)


def test_a_model_that_fits_no_device_is_split() -> None:
    """As few ranks as it takes, without anybody asking for it; each rank has the blocks of its part."""
    big = shape(64, segments=(8192, 4096), ranks=(2, 4))
    recorder = world({"big": big, "a": shape()}, arenas=(40, 40))
    recorder.arrive(1, "big", (1, 2, 3), 10)
    recorder.world.run()
    recorder.assert_output(1)
    assert status_of(recorder, "big").groups == ((0, 1),)
    devices = recorder.world.node.status(0).devices
    assert [device.weights_bytes for device in devices] == [6144, 6144]


def test_a_model_that_cannot_be_split_is_refused() -> None:
    """With the size that it needs; and one that is to be split in a way it cannot be, with that."""
    services = {"big": shape(64, segments=(16384,)), "a": shape()}
    recorder = world(services, arenas=(40, 40), tensor_parallel={"a": 2})
    assert "needs" in status_of(recorder, "big").reason
    assert "cannot be split over 2 devices: it has to be on one" in status_of(recorder, "a").reason


def test_devices_that_are_not_there_are_told() -> None:
    """Not how many it needs, which are there: a figure too high in the configuration has to be found."""
    recorder = world({"a": shape()}, arenas=(40,), groups={"a": ((7,),)})
    assert status_of(recorder, "a").reason == "its devices, [[7]], are none of the 1 here"


def test_parts_of_the_image_go_to_their_ranks() -> None:
    """Rank r copies the r-th part of the host image, and knows its place in the group."""
    recorder = world({"a": shape(segments=(512, 256), ranks=(2,))}, (40, 40), tensor_parallel={"a": 2})
    sent: list[tuple[int, CopyIn]] = []

    def observe(_event: ev.Event, actions: list[ev.Action]) -> None:
        sent.extend(
            (a.device, a.message)
            for a in actions
            if isinstance(a, ev.ToDevice) and isinstance(a.message, CopyIn)
        )

    recorder.world._observe = observe
    recorder.arrive(1, "a", (1,), 2)
    recorder.world.run()
    assert [device for device, _ in sent] == [0, 1]
    assert [copy.extents[0].image_at for _, copy in sent] == [0, 384]
    groups = [copy.group for _, copy in sent]
    assert [(g.rank, g.ranks) for g in groups if g is not None] == [(0, 2), (1, 2)]


def test_configured_places_are_kept() -> None:
    """Manual placement: a service comes in on the groups that were named, in their rank order."""
    recorder = world(
        {"a": shape(ranks=(2,)), "b": shape()},
        (40, 40, 40),
        tensor_parallel={"a": 2},
        groups={"a": ((2, 0),), "b": ((1,),)},
    )
    recorder.arrive(1, "a", (1,), 5)
    recorder.arrive(2, "b", (1,), 5)
    recorder.world.run()
    assert status_of(recorder, "a").groups == ((2, 0),)
    assert status_of(recorder, "b").groups == ((1,),)


def test_a_busy_neighbour_delays_a_group_by_steps_not_for_ever() -> None:
    """One service keeps device 0 full; the group's steps still get their turn there."""
    recorder = world(
        {"pair": shape(ranks=(2,)), "busy": shape()},
        (120, 120),
        tensor_parallel={"pair": 2},
        groups={"busy": ((0,),)},
        policy="round-robin",
    )
    order: list[str] = []

    def observe(_event: ev.Event, actions: list[ev.Action]) -> None:
        order.extend(
            a.message.service
            for a in actions
            if isinstance(a, ev.ToDevice) and isinstance(a.message, Step) and a.device == 0
        )

    recorder.arrive(1, "pair", (1,), 20)
    recorder.arrive(2, "busy", (1,), 30)
    recorder.world._observe = observe
    recorder.world.run()
    first = order.index("pair")
    together = order[first : len(order) - order[::-1].index("pair")]
    assert together.count("pair") == 20
    assert together.count("busy") <= 21, "the group waited for more than one step of its neighbour"


def test_a_busy_group_does_not_keep_its_neighbour_from_stepping() -> None:
    """A device where the group is alone asks for its next step first, every time; the neighbour on the other
    device has its turns all the same."""
    recorder = world(
        {"wide": shape(ranks=(2,)), "a": shape()},
        (60, 60),
        tensor_parallel={"wide": 2},
        groups={"wide": ((0, 1),), "a": ((1,),)},
        preload=("wide", "a"),
    )
    recorder.arrive(1, "wide", (1, 2), 60)
    recorder.world.run(until=recorder.world.now + 0.1)
    assert recorder.outputs[1]
    recorder.arrive(2, "a", (3, 4), 5)
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    ends = list(recorder.finished)
    assert ends == [2, 1], "the neighbour waited until the group had nothing left to do"


@pytest.mark.parametrize("policy", ["budget", "round-robin"])
def test_a_group_that_waits_for_memory_does_not_stop_who_has_it(policy: str) -> None:
    """Device 0 is busy for long, device 1's memory is its neighbour's: kept free for the group's step, which
    cannot be formed, device 1 would never give that memory back."""
    recorder = world(
        {"g": shape(ranks=(2,), context=400), "slow": shape(context=400), "quick": shape(context=400)},
        (400, 100),
        tensor_parallel={"g": 2},
        groups={"g": ((0, 1),), "slow": ((1,),), "quick": ((0,),)},
        preload=("g", "slow", "quick"),
        policy=policy,
        step_tokens=512,
        prefix_reuse=False,
        replicate=False,
        replacement=ReplacementSettings(enabled=False),
    )
    there = recorder.world
    recorder.arrive(1, "slow", tuple(range(40)) * 6, 100)
    for request in (2, 3, 4):
        recorder.arrive(request, "quick", (request,), 390)
    there.run(until=there.now + 0.1)
    recorder.arrive(5, "g", tuple(range(40)) * 8, 5)
    while len(recorder.finished) < 2:
        assert there.step()
    assert list(recorder.finished) == [1, 5], "quick had to end first"
    there.run()
    for request in range(1, 6):
        recorder.assert_output(request)


def test_a_cancelled_wait_leaves_the_turn_to_other_groups() -> None:
    """Device 0 was to be the first group's next, whose only request went meanwhile; the second one waits for
    the same device, and would do so as long as that has work."""
    recorder = world(
        {"first": shape(ranks=(2,)), "second": shape(ranks=(2,)), "busy": shape(context=400)},
        (200, 200, 200),
        tensor_parallel={"first": 2, "second": 2},
        groups={"first": ((0, 1),), "second": ((0, 2),), "busy": ((0,),)},
        preload=("first", "second", "busy"),
        policy="fcfs",
        replicate=False,
        replacement=ReplacementSettings(enabled=False),
    )
    there = recorder.world
    recorder.arrive(1, "busy", (1,), 300)
    there.run(until=there.now + 0.1)
    recorder.arrive(2, "first", (1, 2), 5)
    there.happen(ev.Cancelled(2))
    recorder.arrive(3, "second", (1, 2), 5)
    there.run()
    assert list(recorder.finished) == [2, 3, 1]
    recorder.assert_output(3)


def test_the_loss_of_one_rank_ends_the_group_and_it_comes_back() -> None:
    """Its requests start over; the other rank's memory is free again; the service returns by itself."""
    recorder = world({"a": shape(ranks=(2,))}, (40, 40), tensor_parallel={"a": 2})
    recorder.arrive(1, "a", (1, 2), 40)
    recorder.world.run(until=recorder.world.now + 0.1)
    assert status_of(recorder, "a").running == 1
    recorder.world.devices[1].kill(restart_after=1.0)
    assert recorder.world.node.status(0).devices[0].weights_bytes == 0
    recorder.world.run()
    assert status_of(recorder, "a").groups == ((0, 1),)
    recorder.assert_output(1)
    recorder.arrive(2, "a", (1, 2), 20)
    recorder.world.run()
    recorder.assert_output(2)


def test_prefixes_of_a_broken_group_are_not_trusted() -> None:
    """Rank 0 finished a step that rank 1 did not: what that step wrote is never shared."""
    recorder = world({"a": shape(ranks=(2,))}, (60, 60), tensor_parallel={"a": 2})
    prompt = tuple(range(24))
    recorder.arrive(1, "a", prompt, 1)
    recorder.world.run()
    recorder.arrive(2, "a", prompt, 1)
    recorder.world.run()
    assert recorder.cached[2] > 0
    recorder.world.devices[1].fail_steps = 1
    recorder.arrive(3, "a", prompt, 10)
    while not any("step failed" in note for note in recorder.notes):
        assert recorder.world.step()
    recorder.world.happen(ev.Cancelled(3))  # or it would compute the prefix anew
    recorder.arrive(4, "a", prompt, 5)
    recorder.world.run()
    assert recorder.cached[4] == 0
    recorder.assert_output(4)


@pytest.mark.parametrize(("devices", "found"), [((1, 0), 1), ((0, 1), 0), ((1,), 0), ((0,), 0)])
def test_a_rank_knows_only_the_prefixes_that_it_wrote(devices: tuple[int, ...], found: int) -> None:
    """Protects a rank from KV of other heads: of another rank, or of as many tokens split another way."""
    arenas = [Arena(8), Arena(8)]
    ranks = Ranks([arenas[1], arenas[0]])
    tables = ranks.take(1)
    ranks.index(ranks.parents("root", ([], [])), tables, 0, (7, 8), 1)
    ranks.release(tables)
    shared = Ranks([arenas[device] for device in devices]).share_prefix("root", (7, 8), 2, 1)
    assert [len(table) for table in shared] == [found] * len(devices)


def test_a_group_that_comes_back_one_device_further_finds_no_prefix() -> None:
    """Device 1 keeps what it wrote as rank 0, and is rank 1 now; the simulated devices check what is read."""
    recorder = world(
        {"a": shape(ranks=(2,)), "b": shape(segments=(6144,)), "c": shape(segments=(6144,))},
        (40, 40, 40),
        tensor_parallel={"a": 2},
        groups={"b": ((0,),), "c": ((2,),)},
        replicate=False,
        replacement=ReplacementSettings(enabled=False),
    )
    there, prompt = recorder.world, tuple(range(24))
    recorder.arrive(1, "b", (1,), 4)
    there.run(until=there.now + 5)
    recorder.arrive(2, "a", prompt, 4)
    there.run(until=there.now + 5)
    assert status_of(recorder, "a").groups == ((1, 2),)
    there.happen(ev.EvictWanted(1, "a"))
    there.happen(ev.EvictWanted(2, "b"))
    recorder.arrive(3, "c", (1,), 4)
    there.run(until=there.now + 5)
    for request in (4, 5):
        recorder.arrive(request, "a", prompt, 4)
        there.run(until=there.now + 5)
        assert status_of(recorder, "a").groups == ((0, 1),)
        recorder.assert_output(request)
    assert (recorder.cached[4], recorder.cached[5]) == (0, 16)


def test_saved_kv_of_a_group_that_left_is_not_trusted_after_a_failure() -> None:
    """A step is on its way, KV is saved behind it, the group leaves, and then rank 1 fails the step."""
    recorder = world({"a": shape(ranks=(2,))}, (40, 40), tensor_parallel={"a": 2}, host_kv=20)
    there, node = recorder.world, recorder.world.node
    recorder.arrive(1, "a", tuple(range(12)), 30)
    while len(recorder.outputs.get(1, ())) < 5:
        assert there.step()
    (replica,) = node.state.services["a"].replicas
    assert node.state.devices[1].inflight
    there.devices[1].fail_steps = 1
    node.state.actions = []
    node._room.drain(replica, admit_below=0, seconds=0.0)
    node.state.services["a"].evict_tickets.append(0)
    there.happen(ev.Tick())
    assert replica not in node.state.services["a"].replicas
    assert node.state.requests[1].saved is not None
    there.run()
    assert there.devices[1].fail_steps == 0
    recorder.assert_output(1)


def waiting_for_a_pair() -> Recorder:
    """A request that two devices can hold together and one alone cannot, admitted and not yet begun."""
    recorder = world({"a": shape(ranks=(2,), context=600)}, (70, 70), replicate=False)
    node = recorder.world.node
    node._residency.set_ranks(node.state.services["a"], 2)  # as a plan does with an absent service
    recorder.arrive(1, "a", tuple(range(20)), 300)
    assert 1 in node.state.requests
    return recorder


def test_no_place_is_taken_that_is_too_small_for_what_waits() -> None:
    """Protects who was admitted by a group's limit from failing for lack of room on a single device."""
    recorder = waiting_for_a_pair()
    state, places = recorder.world.node.state, recorder.world.node._places
    service, devices = state.services["a"], list(state.devices.values())
    assert places.holds_waiting(service, devices)
    assert not places.holds_waiting(service, devices[:1])
    recorder.world.run()
    recorder.assert_output(1)
    assert places.holds_waiting(service, devices)


def test_ranks_stay_while_somebody_waits_who_needs_them() -> None:
    """A worker that comes back makes the node choose ranks anew: not fewer than those admitted by."""
    recorder = waiting_for_a_pair()
    recorder.world.devices[1].kill(restart_after=1.0)
    recorder.world.run()
    recorder.assert_output(1)
    assert status_of(recorder, "a").groups == ((0, 1),)

"""A busy service comes in on idle devices too, and gives them back."""

from __future__ import annotations

import pytest

from seallmd.core import events as ev
from seallmd.core.rounds import Rounds
from seallmd.core.service import Image
from seallmd.core.settings import ReplacementSettings
from seallmd.core.status import ServiceStatus
from seallmd.sim.world import Costs
from tests.core.helpers import Recorder, shape, world


def status_of(recorder: Recorder, name: str) -> ServiceStatus:
    return next(s for s in recorder.world.node.status(recorder.world.now).services if s.name == name)


def busy(recorder: Recorder, service: str = "a", count: int = 24, first: int = 1) -> None:
    """More requests than one device runs at its best."""
    for request in range(first, first + count):
        recorder.arrive(request, service, (request % 50, 1), 40)


def two_devices(**limits: object) -> Recorder:
    return world({"a": shape(), "b": shape()}, arenas=(120, 120), replicate_seconds=0.2, **limits)


def test_a_busy_service_uses_an_idle_device() -> None:
    """Both devices run its requests; every one of them is right."""
    recorder = two_devices(max_rows=8)
    busy(recorder)
    recorder.world.run(until=recorder.world.now + 0.6)
    assert status_of(recorder, "a").devices == (0, 1)
    recorder.world.run()
    steps = [device.steps for device in recorder.world.node.status(0).devices]
    assert min(steps) > 0.3 * max(steps), "the second device hardly helped"
    for request in range(1, 25):
        recorder.assert_output(request)


def test_memory_for_few_requests_is_a_reason_too() -> None:
    """A step of all of them would be as fast on one device, but there is KV for two at a time."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(30, 30), replicate_seconds=0.2, max_rows=64)
    busy(recorder, count=12)
    recorder.world.run()
    steps = [device.steps for device in recorder.world.node.status(0).devices]
    assert min(steps) > 0.3 * max(steps), "the second device hardly helped"


def test_replication_can_be_switched_off() -> None:
    """The baseline."""
    recorder = two_devices(max_rows=8, replicate=False)
    busy(recorder)
    recorder.world.run()
    assert recorder.world.node.status(0).devices[1].steps == 0


def test_a_quiet_service_stays_on_one_device() -> None:
    """One request at a time gains nothing from a second replica."""
    recorder = two_devices()
    for request in range(1, 6):
        recorder.arrive(request, "a", (request,), 40)
        recorder.world.run()
    assert len(status_of(recorder, "a").devices) == 1


def test_a_replica_gives_way_to_another_service() -> None:
    """What was idle when it was taken is given back at once, without waiting for patience."""
    recorder = world(
        {"a": shape(), "b": shape()},
        arenas=(22, 22),
        replicate_seconds=0.1,
        min_residency_swaps=0.0,
        patience_seconds=100.0,
        max_rows=4,
    )
    busy(recorder, count=16)
    recorder.world.run()
    assert len(status_of(recorder, "a").devices) == 2
    recorder.arrive(100, "b", tuple(range(30)), 30)
    recorder.world.run()
    recorder.assert_output(100)
    assert len(status_of(recorder, "a").devices) == 1


def test_evict_takes_every_replica() -> None:
    """The operator's word means the whole service."""
    recorder = two_devices(max_rows=8)
    busy(recorder)
    recorder.world.run(until=recorder.world.now + 0.6)
    recorder.world.happen(ev.EvictWanted(1, "a"))
    recorder.world.run()
    assert recorder.answers[1] == ""
    assert status_of(recorder, "a").devices == ()
    assert all(d.weights_bytes == 0 for d in recorder.world.node.status(0).devices)
    for request in range(1, 25):
        recorder.assert_output(request)


def test_a_lost_worker_leaves_the_other_replica_serving() -> None:
    """What ran on the dead device goes on at the other one."""
    recorder = two_devices(max_rows=8)
    busy(recorder, count=40)
    recorder.world.run(until=recorder.world.now + 0.6)
    assert len(status_of(recorder, "a").devices) == 2
    recorder.world.devices[1].kill(restart_after=100.0)
    assert any("starts over" in note for note in recorder.notes)
    assert status_of(recorder, "a").devices == (0,)
    recorder.world.run()
    for request in range(1, 41):
        recorder.assert_output(request)


@pytest.mark.parametrize("stand_in", [True, False])
def test_under_pressure_a_spare_replica_leaves_before_requests_do(stand_in: bool) -> None:
    """What is there twice is the cheapest to give: nobody of the service that lacks memory is preempted."""
    recorder = world(
        {"a": shape(), "big": shape(segments=(30 * 256,))},
        (60, 60),
        groups={"a": ((0,),), "big": ((0,), (1,)) if stand_in else ((0,),)},
        min_residency_swaps=0.0,
        replicate_seconds=0.05,
        replicate_gain=1.0,
        replacement=ReplacementSettings(enabled=False),
    )
    recorder.arrive(9, "a", (1,), 1)
    recorder.world.run()
    for request in (1, 2):
        recorder.arrive(request, "big", (request, 2), 50)
    recorder.world.run(until=recorder.world.now + 0.3)
    assert len(status_of(recorder, "big").devices) == 1 + stand_in
    for request in (3, 4):
        recorder.arrive(request, "big", (request, 2), 40)
    for request in range(10, 14):
        recorder.arrive(request, "a", (request,), 40)
    recorder.world.run()
    assert (status_of(recorder, "a").preemptions > 0) != stand_in
    assert any("its service is elsewhere too" in note for note in recorder.notes) == stand_in
    for request in recorder.prompts:
        recorder.assert_output(request)


def test_an_operator_says_where_a_replica_goes() -> None:
    """Protects loading onto named devices: beside what there is, answered when it is there, or refused."""
    recorder = two_devices(replicate=False)
    recorder.arrive(1, "a", (1, 2), 4)
    recorder.world.run()
    (here,) = status_of(recorder, "a").devices
    recorder.world.happen(ev.LoadWanted(1, "a", (1 - here,)))
    assert 1 not in recorder.answers, "its copy has only begun"
    recorder.world.run()
    assert recorder.answers[1] == ""
    assert set(status_of(recorder, "a").devices) == {0, 1}
    for ticket, devices in enumerate(((here,), (0, 1), (7,)), 2):  # there already, too many, unknown
        recorder.world.happen(ev.LoadWanted(ticket, "a", devices))
        assert "cannot come to" in recorder.answers[ticket]


def test_a_request_alone_is_as_well_off_as_can_be() -> None:
    """What is left out for being quicker to see is what the prediction would say, too."""
    recorder, seen = two_devices(), set()
    for request, service in enumerate("aabab", 1):
        recorder.arrive(request, service, (request, 1), 10 * request)
    while recorder.world.step():
        state = recorder.world.node.state
        rounds = Rounds(state)
        for replica in (r for service in state.services.values() for r in service.replicas if r.running):
            parts = rounds.parts_on(state.group(replica)).values()
            least = rounds.wait_seconds(parts) <= rounds.least_seconds(parts) * 1.000001
            seen.add((rounds.is_best(replica), least))
    assert (True, False) not in seen
    assert seen >= {(True, True), (False, False)}


@pytest.mark.parametrize("prompt", [110, 200])
def test_nobody_makes_room_for_itself_by_leaving(prompt: int) -> None:
    """A request that is about to enter a replica needs memory there: the replica is no spare one then, though
    its service is elsewhere too. It was evicted, and the request entered it all the same."""
    recorder = world(
        {"s": shape(segments=(1024, 512, 256), context=1024), "x": shape(segments=(90 * 256,))},
        arenas=(120, 120),
        groups={"x": ((0,),)},
        costs=Costs(copy_byte=1e-4),  # `x` is on its way for two seconds
        replacement=ReplacementSettings(enabled=False),
        replicate=False,
        migrate=False,
    )
    now = recorder.world.now
    recorder.arrive(1, "s", (1,), 3)
    recorder.world.run(until=now + 3)
    recorder.world.happen(ev.LoadWanted(2, "s", (1,)))
    recorder.world.run(until=now + 6)
    for request in range(2, 6):  # both replicas have served
        recorder.arrive(request, "s", (request,), 6)
    recorder.world.run(until=now + 60)
    recorder.arrive(9, "x", (1,), 3)
    while not recorder.world.node.state.services["x"].replicas:
        recorder.world.step()
    recorder.arrive(30, "s", tuple(i % 50 for i in range(prompt)), 8)
    recorder.world.run(until=recorder.world.now + 30)
    recorder.assert_output(30)
    assert not [note for note in recorder.notes if "elsewhere too" in str(note)]


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_an_image_that_comes_to_nothing_costs_a_replica_and_no_request(how: str) -> None:
    """A service that is there serves on from its device, nobody is refused, and the next try comes later."""
    recorder = two_devices(
        max_rows=4, costs=Costs(read_byte=1e-3), replacement=ReplacementSettings(enabled=False)
    )
    recorder.arrive(1, "a", (1, 2), 5)
    recorder.world.run()
    host, service, tries = recorder.world.host, recorder.world.node.state.services["a"], list[float]()
    host.kill(0.5)  # its image is gone; what is on the device stays
    recorder.world.run()
    host.fail_images = 2 if how == "fails" else 0
    busy(recorder, count=90, first=2)
    while len(tries) < 3:
        was = service.image
        assert recorder.world.step(), "it was never tried again"
        if was is not Image.BUILDING and service.image is Image.BUILDING:
            tries.append(recorder.world.now)
            if how == "dies" and len(tries) < 3:
                host.kill(0.2)
    assert tries[1] - tries[0] >= 1.0
    assert tries[2] - tries[1] >= 2.0
    recorder.arrive(100, "a", (3, 4), 5)
    recorder.world.run()
    assert len(status_of(recorder, "a").devices) == 2
    for request in recorder.prompts:
        recorder.assert_output(request)


def test_a_pinned_service_takes_no_device_that_it_would_not_give_back() -> None:
    """A few busy seconds would else make its pin one of both devices, and the other service be refused."""
    recorder = world(
        {"a": shape(), "b": shape(segments=(104 * 256,))},
        arenas=(120, 120),
        pinned=("a",),
        replicate_seconds=0.2,
        max_rows=8,
    )
    recorder.arrive(100, "b", (1, 2), 5)
    recorder.world.run()
    recorder.world.happen(ev.EvictWanted(1, "b"))
    busy(recorder, count=38)
    recorder.world.run()
    assert len(status_of(recorder, "a").devices) == 1
    recorder.arrive(101, "b", tuple(range(20)), 5)
    recorder.world.run()
    for request in recorder.prompts:
        recorder.assert_output(request)


def test_what_one_replica_alone_can_hold_does_not_wait_for_the_other() -> None:
    """Devices of unequal size: the small one runs none of the long requests, so it has no part in them."""
    recorder = world({"a": shape(context=1024)}, (800, 80), replicate=False, migrate=False)
    recorder.arrive(1, "a", (1,), 3)
    recorder.world.run()
    recorder.world.happen(ev.LoadWanted(1, "a", (1,)))
    recorder.world.run()
    assert status_of(recorder, "a").devices == (0, 1)
    for request in range(10, 20):
        recorder.arrive(request, "a", (request, 2), 600)
    recorder.arrive(20, "a", (20, 2), 30)
    recorder.world.run(until=recorder.world.now + 0.2)
    running = {r.devices: len(r.running) for r in recorder.world.node.state.services["a"].replicas}
    assert running == {(0,): 10, (1,): 1}

"""What operators ask for: pins, drains and idle limits, each answered when it is done."""

from __future__ import annotations

import pytest

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.settings import ReplacementSettings
from seallmd.core.status import ServiceStatus
from seallmd.sim.world import Costs
from tests.core.helpers import Recorder, shape, world

SMALL = {"a": shape(), "b": shape(), "c": shape()}


def of(recorder: Recorder, name: str) -> ServiceStatus:
    services = recorder.world.node.status(recorder.world.now).services
    return next(service for service in services if service.name == name)


def run(recorder: Recorder, seconds: float) -> None:
    recorder.world.run(until=recorder.world.now + seconds)


def load(recorder: Recorder, *names: str) -> None:
    for ticket, name in enumerate(names, 100):
        recorder.world.happen(ev.LoadWanted(ticket, name))
        run(recorder, 1.0)
        assert recorder.answers[ticket] == ""


def test_a_pinned_service_comes_in_and_stays() -> None:
    """A pin brings it in, and no other service pushes it out; unpinned, it goes like any other."""
    recorder = world(SMALL, arenas=(22,), patience_seconds=0.1, min_residency_swaps=0.0)
    recorder.world.happen(ev.PinWanted(1, "a"))
    run(recorder, 1.0)
    assert recorder.answers == {1: ""}
    assert (of(recorder, "a").state, of(recorder, "a").pinned) == ("resident", True)
    recorder.arrive(1, "b", (1, 2), 3)
    run(recorder, 5.0)
    assert recorder.finished[1].code == "model_unavailable"
    recorder.world.happen(ev.PinWanted(2, "a", pinned=False))
    run(recorder, 5.0)
    recorder.arrive(2, "b", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(2)
    assert of(recorder, "a").state == "absent"


def test_a_pin_that_cannot_be_kept_is_refused() -> None:
    """Memory is never promised twice."""
    recorder = world(SMALL, arenas=(22,), pinned=("a",))
    recorder.world.happen(ev.PinWanted(1, "b"))
    recorder.world.happen(ev.PinWanted(2, "nobody"))
    assert "pinned services leave no room" in recorder.answers[1]
    assert not of(recorder, "b").pinned
    assert recorder.answers[2] == "no service is called 'nobody'"


def test_a_pin_ends_what_no_longer_fits() -> None:
    """A long request that waits for its turn would else wait for ever beside what never leaves."""
    recorder = world({"a": shape(), "b": shape(64, (512, 256, 256), 200)}, arenas=(30,), policy="fcfs")
    load(recorder, "a")
    recorder.arrive(1, "a", (1,), 60)
    recorder.arrive(2, "b", tuple(range(60)), 40)
    recorder.world.happen(ev.PinWanted(3, "a"))
    assert recorder.answers[3] == ""
    recorder.world.run()
    assert recorder.finished[2].reason == "failed" or recorder.outputs[2]
    assert set(recorder.finished) == {1, 2}


def test_a_drained_service_finishes_and_takes_nothing_new() -> None:
    """The command ends with the last request; others go on; undrained, it serves again."""
    recorder = world(SMALL)
    load(recorder, "a")
    recorder.arrive(1, "a", (1, 2), 30)
    recorder.world.happen(ev.ServiceDrainWanted(1, "a"))
    recorder.arrive(2, "a", (3,), 3)
    recorder.arrive(3, "b", (3,), 3)
    assert (recorder.finished[2].code, recorder.finished[2].status) == ("draining", 503)
    assert recorder.finished[2].retry_after > 0
    assert 1 not in recorder.answers
    recorder.world.run()
    assert recorder.answers[1] == ""
    recorder.assert_output(1)
    recorder.assert_output(3)
    recorder.world.happen(ev.ServiceDrainWanted(2, "a", drained=False))
    recorder.arrive(4, "a", (3,), 3)
    recorder.world.run()
    recorder.assert_output(4)


def test_undraining_ends_the_drain_that_waits() -> None:
    """Whoever waits for it is told that it will not come about."""
    recorder = world(SMALL)
    recorder.arrive(1, "a", (1, 2), 30)
    for ticket, drained in ((1, True), (2, False)):
        recorder.world.happen(ev.ServiceDrainWanted(ticket, "a", drained))
    assert recorder.answers == {1: "it was undrained", 2: ""}
    for ticket, drained in ((3, True), (4, False)):
        recorder.world.happen(ev.NodeDrainWanted(ticket, drained))
    assert recorder.answers[3] == "it was undrained"


def test_a_drained_node_takes_nothing_new_until_it_is_undrained() -> None:
    """For a load balancer: what runs ends well, new requests go elsewhere."""
    recorder = world(SMALL)
    recorder.arrive(1, "a", (1, 2), 30)
    recorder.world.happen(ev.NodeDrainWanted(1))
    recorder.arrive(2, "b", (1, 2), 3)
    assert recorder.finished[2].code == "draining"
    recorder.world.run()
    assert recorder.answers == {1: ""}
    recorder.assert_output(1)
    recorder.world.happen(ev.NodeDrainWanted(2, drained=False))
    recorder.arrive(3, "b", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(3)


def test_a_node_that_stops_is_not_undrained() -> None:
    """An operator cannot call a shutdown off by half."""
    recorder = world(SMALL)
    recorder.world.happen(ev.DrainWanted())
    recorder.world.happen(ev.NodeDrainWanted(1, drained=False))
    assert recorder.answers == {1: "the daemon is shutting down"}
    recorder.arrive(1, "a", (1,), 1)
    assert recorder.finished[1].code == "shutting_down"


def test_a_drained_device_empties_and_stays_empty() -> None:
    """What runs there ends there, what waits goes to the other device, pinned services too."""
    recorder = world(SMALL, arenas=(60, 60), pinned=("a",), replacement=None, replicate=False)
    run(recorder, 1.0)
    device = of(recorder, "a").device
    assert device is not None
    recorder.arrive(1, "a", (1, 2), 30)
    run(recorder, 0.1)
    recorder.world.happen(ev.DeviceDrainWanted(1, device))
    recorder.arrive(2, "a", (5, 6), 4)
    recorder.arrive(3, "b", (5, 6), 4)
    recorder.world.run()
    for request in (1, 2, 3):
        recorder.assert_output(request)
    assert recorder.answers[1] == ""
    assert not recorder.world.node.state.devices[device].replicas
    assert of(recorder, "a").devices == of(recorder, "b").devices == (1 - device,)
    recorder.world.happen(ev.DeviceDrainWanted(2, 7))
    assert recorder.answers[2] == "there is no device 7"


def test_with_all_its_devices_drained_a_service_says_so() -> None:
    """An honest refusal, with a time to try again, instead of silence; undrained, it is served."""
    recorder = world(SMALL)
    recorder.world.happen(ev.DeviceDrainWanted(1, 0))
    recorder.arrive(1, "a", (1, 2), 3)
    run(recorder, 30.0)
    assert "drained" in recorder.finished[1].error
    assert recorder.finished[1].retry_after > 0
    recorder.world.happen(ev.DeviceDrainWanted(2, 0, drained=False))
    recorder.arrive(2, "a", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(2)


def test_a_device_that_was_lost_stays_drained() -> None:
    """A restart of its worker is no undrain."""
    recorder = world(SMALL)
    load(recorder, "a")
    recorder.world.happen(ev.DeviceDrainWanted(1, 0))
    recorder.world.devices[0].kill(restart_after=0.5)
    recorder.world.run()
    assert recorder.answers[1] == ""
    assert recorder.world.node.status(0).devices[0].drained
    assert of(recorder, "a").state == "absent"


def test_an_idle_service_leaves_at_its_time() -> None:
    """The clock starts with the end of the last request, not with its arrival; pinned ones stay."""
    recorder = world(SMALL, idle_seconds={"a": 5.0, "b": 5.0}, pinned=("b",))
    recorder.arrive(1, "a", (1, 2), 40)
    recorder.world.run(until=30.0)
    ended = recorder.world.node.state.services["a"].idle_since
    assert of(recorder, "a").state == "absent"
    assert of(recorder, "b").state == "resident"
    assert "evicted from device 0: idle for 5 s" in recorder.notes
    recorder.arrive(2, "a", (1, 2), 40)
    recorder.world.run(until=recorder.world.now + 4.0)
    assert of(recorder, "a").state == "resident"
    assert recorder.world.node.state.services["a"].idle_since > ended


def test_a_client_may_say_how_long_a_service_stays() -> None:
    """Ollama's keep_alive, instead of what is configured; 0 is for good."""
    recorder = world(SMALL, idle_seconds={"a": 2.0})
    recorder.world.happen(ev.KeepWanted("a", 0.0))
    load(recorder, "a")
    run(recorder, 60.0)
    assert of(recorder, "a").state == "resident"
    recorder.world.happen(ev.KeepWanted("a", 3.0))
    recorder.world.run()
    assert of(recorder, "a").state == "absent"


def test_a_limit_that_is_no_time_at_all() -> None:
    """Clients choose it. Whoever is wanted stays until nobody wants it; the node decides that once, not for
    ever."""
    recorder = world(SMALL)
    recorder.world.happen(ev.KeepWanted("a", 5e-300))
    recorder.world.happen(ev.LoadWanted(1, "a"))
    recorder.arrive(1, "a", (1, 2, 3), 5)
    recorder.world.run()
    recorder.assert_output(1)
    assert recorder.answers == {1: ""}
    assert "evicted from device 0: idle for 5e-300 s" in recorder.notes
    assert not recorder.world.node.state.services["a"].replicas


@pytest.mark.parametrize("how", ["drain", "kill", "fail"])
def test_a_load_beside_another_replica_that_comes_to_nothing_is_answered(how: str) -> None:
    """Else the operator waits for ever, and the service counts as asked for, so that it never leaves idle."""
    recorder = world(
        SMALL,
        arenas=(60, 60),
        costs=Costs(copy_byte=5e-4),
        idle_seconds={"a": 20.0},
        replicate=False,
        replacement=ReplacementSettings(enabled=False),
    )
    load(recorder, "a")
    node, (here,) = recorder.world.node, of(recorder, "a").devices
    recorder.world.happen(ev.LoadWanted(1, "a", (1 - here,)))
    assert 1 not in recorder.answers
    if how == "drain":
        recorder.world.happen(ev.DeviceDrainWanted(2, 1 - here))
    elif how == "kill":
        recorder.world.devices[1 - here].kill(restart_after=2.0)
    else:
        copy = node.state.services["a"].replicas[-1].copy
        recorder.world.happen(ev.FromDevice(1 - here, msg.CopyFailed("a", "no memory", copy)))
    assert recorder.answers[1].startswith(f"a did not come to device {1 - here}: ")
    assert of(recorder, "a").devices == (here,)
    recorder.world.run()
    assert of(recorder, "a").state == "absent"

"""What a failure costs: the request that is its cause, a pause of the service that is, and nobody else."""

from __future__ import annotations

import pytest

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.settings import ReplacementSettings
from tests.core.helpers import VOCAB, Recorder, shape, world

LONG = tuple(number % VOCAB for number in range(600))
OFF = ReplacementSettings(enabled=False)


def wait(recorder: Recorder, seconds: float) -> None:
    """So much virtual time."""
    recorder.world.run(until=recorder.world.now + seconds)


def crash(recorder: Recorder, service: str) -> None:
    """The worker dies in the middle of a step of the service."""
    world, end = recorder.world, recorder.world.now + 30
    device = world.devices[0]
    while not any(s.service == service for s in world.node.state.devices[0].inflight.values()):
        assert world.step()
        assert world.now < end, f"{service} never stepped"
    device.kill(restart_after=0.1)


def test_a_poisonous_request_ends_alone() -> None:
    """Each worker that runs it dies; its batch mates start over and get what they asked for."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(60, 60), replicate=False)
    recorder.world.devices[0].poison.add(4)
    recorder.world.devices[1].poison.add(4)
    for request in range(1, 8):
        recorder.arrive(request, "a", (request, 2), 12)
    recorder.arrive(8, "b", (3,), 40)
    recorder.world.run()
    finish = recorder.finished.pop(4)
    assert (finish.code, finish.status, finish.retry_after) == ("worker_lost", 500, 0.0)
    for request in recorder.finished:
        recorder.assert_output(request)
    recorder.arrive(9, "a", (1,), 3)
    recorder.world.run()
    recorder.assert_output(9)


def test_a_request_that_fails_its_steps_ends_alone() -> None:
    """One failed step costs nobody anything; a second one of a request alone is its end."""
    recorder = world({"a": shape()}, pipeline_depth=1)
    recorder.arrive(1, "a", (1, 2), 10)
    recorder.arrive(2, "a", (1, 3), 10)
    recorder.world.devices[0].fail_steps = 1
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    recorder.world.devices[0].fail_steps = 2
    recorder.arrive(3, "a", (1, 4), 10)
    recorder.world.run()
    assert recorder.finished[3].code == "step_failed"


def test_out_of_memory_is_tried_in_smaller_steps() -> None:
    """Requests that were too many together run one by one; one that is too large alone is told so."""
    recorder = world({"a": shape()}, arenas=(80,))
    device = recorder.world.devices[0]
    say, limit = device._say, 3

    def run_out(message: msg.Message) -> None:
        if isinstance(message, msg.StepDone) and len(rows_of[message.step]) >= limit:
            device._memory.forget(rows_of[message.step])
            message = msg.StepFailed(message.step, "out of memory", memory=True)
        say(message)  # type: ignore[arg-type]

    rows_of: dict[int, list[int]] = {}
    follow = recorder.observe

    def observe(event: ev.Event, actions: list[ev.Action]) -> None:
        for action in actions:
            if isinstance(action, ev.ToDevice) and isinstance(action.message, msg.Step):
                rows_of[action.message.step] = [row.request for row in action.message.rows]
        follow(event, actions)

    device._say = run_out  # type: ignore[method-assign]
    recorder.world._observe = observe
    for request in range(1, 5):
        recorder.arrive(request, "a", (request,), 3)
    recorder.world.run()
    for request in range(1, 5):
        recorder.assert_output(request)
    limit = 1
    recorder.arrive(5, "a", (5,), 3)
    recorder.world.run()
    assert (recorder.finished[5].code, recorder.finished[5].status) == ("out_of_memory", 503)


def test_a_service_of_which_workers_die_pauses() -> None:
    """The first death costs nobody anything; from the second on it pauses, twice as long each time."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(80,))
    refused = []
    for request in range(1, 5):
        recorder.arrive(2 * request, "a", (1, request), 20)
        recorder.arrive(2 * request + 1, "a", (2, request), 20)  # with company, none of them is the cause
        crash(recorder, "a")
        recorder.arrive(100 + request, "a", (1,), 2)
        refused.append(
            recorder.finished[100 + request].retry_after if 100 + request in recorder.finished else 0
        )
        wait(recorder, refused[-1] - 0.01)
        assert recorder.world.node.state.services["a"].replicas == [] or not refused[-1]
        wait(recorder, 0.2)
    assert refused == [0, pytest.approx(1.0), pytest.approx(2.0), pytest.approx(4.0)]
    recorder.arrive(200, "a", (1,), 3)
    recorder.arrive(201, "b", (1,), 3)
    recorder.world.run()
    recorder.assert_output(200)
    recorder.assert_output(201)


def test_time_heals_a_service() -> None:
    """Two deaths with a good while of work between them are not two in a row."""
    recorder = world({"a": shape()})
    for request in (1, 2, 3):
        recorder.arrive(request, "a", (1, 2), 30)
        crash(recorder, "a")
        recorder.world.run()
        recorder.assert_output(request)
        wait(recorder, 20)
        recorder.arrive(10 + request, "a", (1,), 2)
        recorder.world.run()


def test_the_loader_dies_twice_of_a_model() -> None:
    """Of one it reads: waiters are told; of one it examines: it is refused, the others are served."""
    recorder = world({"a": shape(), "b": shape()})
    recorder.arrive(1, "a", (1,), 2)
    recorder.world.host.kill(restart_after=0.01)
    assert not recorder.finished, "once is tried again"
    while recorder.world.node.state.services["a"].image.value != "building":
        assert recorder.world.step()
    recorder.world.host.kill(restart_after=0.01)
    assert "died while it read" in recorder.finished[1].error
    assert recorder.finished[1].retry_after > 0
    recorder.world.run()

    again = world({"a": shape(), "b": shape()})
    state = again.world.node.state
    for service in state.services.values():
        service.shape = None
    again.world.host.kill(restart_after=0.01)
    assert [s.crashes for s in state.services.values()] == [0, 0], "it had nothing to do"
    for _ in range(2):
        wait(again, 0.011)
        again.world.host.kill(restart_after=0.01)
    assert [s.crashes for s in state.services.values()] == [1, 1], "who was first is examined last"
    wait(again, 0.011)
    again.world.host.kill(restart_after=0.01)
    assert "died twice" in state.services["a"].refused
    assert not state.services["b"].refused


def test_nobody_waits_for_a_device_that_does_not_come_back() -> None:
    """After a while: 503 with Retry-After, at once for those who come later; then service as before."""
    recorder = world({"a": shape()})
    recorder.world.devices[0].kill(restart_after=100.0)
    recorder.arrive(1, "a", (1, 2), 3)
    wait(recorder, 29.0)
    assert not recorder.finished
    wait(recorder, 2.0)
    assert (recorder.finished[1].status, recorder.finished[1].retry_after) == (503, 5.0)
    recorder.arrive(2, "a", (1, 2), 3)
    assert 0 < recorder.finished[2].retry_after <= 5.0
    wait(recorder, 10.0)
    recorder.arrive(3, "a", (1, 2), 3)
    assert recorder.finished[3].status == 503
    wait(recorder, 80.0)
    recorder.arrive(4, "a", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(4)


def test_another_device_that_is_too_small_is_none() -> None:
    """Nobody waits for the only large device either, while a small one is up and others are served there."""
    models = {"a": shape(segments=(150 * 256,)), "b": shape()}
    recorder = world(models, (100, 300), groups={"b": ((0,),)}, replicate=False, replacement=OFF)
    recorder.arrive(1, "a", (1, 2), 50)
    wait(recorder, 0.3)
    recorder.world.devices[1].kill(restart_after=1000.0)
    wait(recorder, 29.0)
    assert not recorder.finished
    recorder.arrive(2, "b", (1, 2), 5)
    wait(recorder, 2.0)
    recorder.assert_output(2)
    assert (recorder.finished[1].code, recorder.finished[1].retry_after) == ("model_unavailable", 5.0)
    wait(recorder, 10.0)
    recorder.arrive(3, "a", (1, 2), 5)
    assert "no device that it could run on is up" in recorder.finished[3].error
    wait(recorder, 1000.0)
    recorder.arrive(4, "a", (1, 2), 5)
    recorder.world.run()
    recorder.assert_output(4)


def large_one_lost(seconds: float) -> Recorder:
    """A request runs on the larger device when that goes; another as long comes, and one that is short."""
    recorder = world({"a": shape(context=1024)}, (100, 300), replicate=False, replacement=OFF)
    recorder.arrive(1, "a", LONG, 100)
    wait(recorder, 0.5)
    assert recorder.outputs[1]
    recorder.world.devices[1].kill(restart_after=seconds)
    recorder.arrive(2, "a", LONG, 100)
    recorder.arrive(3, "a", (1, 2), 5)
    wait(recorder, 2.5)
    recorder.assert_output(3)
    assert len(recorder.finished) == 1
    return recorder


def test_what_only_a_lost_device_can_hold_waits_for_it() -> None:
    """A worker's death costs no answer, also where the devices left are too small; others go on there."""
    recorder = large_one_lost(3.0)
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)


def test_it_does_not_wait_for_ever() -> None:
    """It is told when the device is not expected any more, and who comes then is refused at once."""
    recorder = large_one_lost(1000.0)
    wait(recorder, 27.0)
    assert len(recorder.finished) == 1
    wait(recorder, 2.0)
    assert [recorder.finished[n].code for n in (1, 2)] == ["out_of_memory"] * 2
    recorder.arrive(4, "a", LONG, 100)
    assert recorder.finished[4].code == "context_length_exceeded"


def beside_a_pinned_one(seconds: float) -> Recorder:
    """Of two equal devices one is lost, the other is almost filled by a pinned service."""
    models = {"a": shape(context=1024), "p": shape(segments=(80 * 256,))}
    pinned, groups = ("p",), {"p": ((0,),)}
    recorder = world(models, (100, 100), pinned=pinned, groups=groups, replicate=False, replacement=OFF)
    recorder.world.devices[1].kill(restart_after=seconds)
    return recorder


def test_a_load_does_not_wait_for_ever_either() -> None:
    """An operator is told as well when the only device with room is not expected any more."""
    recorder = beside_a_pinned_one(1000.0)
    recorder.world.happen(ev.LoadWanted(1, "a"))
    wait(recorder, 27.0)
    assert not recorder.answers
    wait(recorder, 5.0)
    assert "no device that it could run on is up" in recorder.answers[1]


def test_a_lost_device_counts_for_the_limit_of_a_request() -> None:
    """Until it is given up; no event that asks for the limit ends those who wait for it."""
    recorder = beside_a_pinned_one(3.0)
    recorder.arrive(1, "a", LONG[:80], 50)
    recorder.world.happen(ev.PinWanted(1, "p"))
    recorder.world.run()
    recorder.assert_output(1)

    recorder = beside_a_pinned_one(1000.0)
    node = recorder.world.node
    assert node.context_limit("a") == 96 * 4
    recorder.world.happen(ev.DeviceDrainWanted(1, 1))
    assert node.context_limit("a") == 16 * 4, "an operator has taken it out"
    recorder.world.happen(ev.DeviceDrainWanted(2, 1, drained=False))
    node.state.devices[1].arena_bytes = 0
    assert node.context_limit("a") == 1024, "how large it will be is not known"
    wait(recorder, 31.0)
    assert node.context_limit("a") == 16 * 4


@pytest.mark.parametrize(("seconds", "served"), [(3.0, True), (1000.0, False)])
def test_a_run_of_blocks_is_waited_for_too(seconds: float, served: bool) -> None:
    """The device that is up has blocks enough but not in a row: the other may come back with them."""
    models = {"x": shape(segments=(20 * 256,)), "p": shape(), "y": shape(segments=(42 * 256,))}
    groups = dict.fromkeys("xp", ((0,),))
    recorder = world(models, (64, 64), groups=groups, replicate=False, replacement=OFF)
    for request, name in enumerate("xp", 1):
        recorder.arrive(request, name, (1,), 3)
        recorder.world.run()
    recorder.world.happen(ev.PinWanted(1, "p"))
    recorder.world.happen(ev.EvictWanted(2, "x"))
    recorder.world.devices[1].kill(restart_after=seconds)
    recorder.arrive(3, "y", (1,), 3)
    wait(recorder, 29.0)
    assert (3 in recorder.finished) is served
    wait(recorder, 2.0)
    assert recorder.finished[3].code == ("" if served else "model_unavailable")


def test_processes_that_die_while_they_start_are_nobodys_fault() -> None:
    """No service is blamed for a worker or a loader that never was up."""
    recorder = world({"a": shape()})
    recorder.world.devices[0].kill(restart_after=1.0)
    recorder.world.host.kill(restart_after=1.0)
    for _ in range(3):
        recorder.world.happen(ev.WorkerLost(0, "exited with code 1"))
        recorder.world.happen(ev.HostLost("exited with code 1"))
    service = recorder.world.node.state.services["a"]
    assert (service.crashes, service.refused) == (0, "")
    recorder.arrive(1, "a", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(1)

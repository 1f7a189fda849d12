"""Running requests go on in another replica of their service, with their KV, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.settings import ReplacementSettings
from seallmd.sim.world import Costs
from tests.core.helpers import shape, world
from tests.core.test_histories import ACTIONS, PARALLEL, History, seeds

SLOW = Costs(copy_byte=1e-4)  # a block takes 26 ms: long enough for things to happen meanwhile
TOKENS = 40


class Crowd:
    """Services "a" and "b" run side by side on device 0, and device 1 has nothing to do."""

    def __init__(self, costs: Costs = SLOW, requests: int = 2, **limits: object) -> None:
        options = {"replicate_seconds": 0.1, "replacement": ReplacementSettings(enabled=False), **limits}
        self.recorder = world(
            {"a": shape(), "b": shape()}, (120, 120), host_kv=60, costs=costs, **cast(dict, options)
        )
        self.recorder.world.devices[1].kill(restart_after=3.0)  # so that both come in on the other
        for ticket, name in enumerate("ab", 1):
            self.recorder.world.happen(ev.LoadWanted(ticket, name))
        self.recorder.world.run()
        assert len(self.recorder.answers) == 2
        self.sent: list[tuple[int, msg.Message]] = []
        self.recorder.world._observe = self.observe
        for request in range(1, requests + 1):
            prompt = tuple(range(request, request + 9))
            self.recorder.arrive(request, "ab"[request % 2], prompt, TOKENS, scores=True)

    def observe(self, event: ev.Event, actions: list[ev.Action]) -> None:
        self.sent += [(a.device, a.message) for a in actions if isinstance(a, ev.ToDevice)]
        self.recorder.observe(event, actions)

    def until(self, true: Callable[[], bool]) -> None:
        """Go on in small steps until something is so."""
        for _ in range(10_000):
            if true():
                return
            self.recorder.world.run(until=self.recorder.world.now + 0.002)
        raise AssertionError("it never came to that")

    def until_landing(self) -> int:
        """Until a request is on its way; which."""
        self.until(lambda: any(r.landing for r in self.recorder.world.node.state.requests.values()))
        return next(r.id for r in self.recorder.world.node.state.requests.values() if r.landing)

    def moved(self) -> int:
        return sum(s.migrations for s in self.recorder.world.node.status(0).services)

    def finish(self) -> None:
        """Everybody has an answer, the right one, and nothing is left behind."""
        recorder = self.recorder
        recorder.world.run()
        for request in recorder.prompts:
            if recorder.finished[request].reason != "cancelled":
                recorder.assert_output(request)
        state = recorder.world.node.state
        recorder.world.node.check()
        assert all(device.arena is None or device.arena.kv == 0 for device in state.devices.values())
        assert all(state.host_kv.used(device) == 0 for device in state.devices)

    def prefill_tokens(self, request: int) -> int:
        """Tokens of rows that a request was given beyond one at a time."""
        steps = [message for _, message in self.sent if isinstance(message, msg.Step)]
        return sum(row.count for s in steps for row in s.rows if row.request == request and row.count > 1)


@pytest.mark.parametrize("requests", [2, 8])
def test_a_crowded_service_takes_its_requests_to_an_idle_device(requests: int) -> None:
    """What shares a device gets one of its own: the service comes in there, and its requests with their KV.

    Nothing is computed a second time.
    """
    crowd = Crowd(Costs(), requests)
    crowd.finish()
    assert crowd.moved() >= requests / 2
    assert all(crowd.prefill_tokens(request) == 9 for request in crowd.recorder.prompts)
    steps = [device.steps for device in crowd.recorder.world.node.status(0).devices]
    assert min(steps) > 0.4 * max(steps)


def test_answers_come_sooner_by_it() -> None:
    """The baseline, and what it loses."""
    seconds = []
    for migrate in (True, False):
        crowd = Crowd(Costs(), requests=8, migrate=migrate)
        begun = crowd.recorder.world.now
        crowd.until(lambda crowd=crowd: len(crowd.recorder.finished) == 8)  # type: ignore[misc]
        seconds.append(crowd.recorder.world.now - begun)
        assert (crowd.moved() > 0) == migrate
        crowd.finish()
    assert seconds[0] < 0.8 * seconds[1]


def test_a_device_does_not_run_what_is_on_its_way_there() -> None:
    """The first row of a request that moved is sent when its KV is there, and behind it in order."""
    crowd = Crowd()
    request = crowd.until_landing()
    sent = len(crowd.sent)
    crowd.finish()
    later = [message for device, message in crowd.sent[sent:] if device == 1]
    restored = next(n for n, message in enumerate(later) if isinstance(message, msg.RestoreBlocks))
    steps = [
        n for n, m in enumerate(later) if isinstance(m, msg.Step) and request in [r.request for r in m.rows]
    ]
    assert min(steps) > restored
    assert later[restored].device == 0  # type: ignore[attr-defined]
    assert crowd.prefill_tokens(request) == 9


def test_a_client_leaves_meanwhile() -> None:
    """Its blocks and its host memory are free at once; what is still being copied hurts nobody."""
    crowd = Crowd()
    request = crowd.until_landing()
    crowd.recorder.world.happen(ev.Cancelled(request))
    crowd.finish()


@pytest.mark.parametrize("device", [0, 1])
def test_a_worker_dies_meanwhile(device: int) -> None:
    """The one that it leaves: it starts over from its tokens. The one that it goes to: its KV is still there.

    A step that the former has not ended counts in either case, or is computed again with all that it told.
    """
    crowd = Crowd(prefix_reuse=False)
    request = crowd.until_landing()
    crowd.recorder.world.devices[device].kill(restart_after=0.5)
    crowd.finish()
    assert (crowd.prefill_tokens(request) == 9) == (device == 1)


def test_what_a_step_tells_counts_as_its_tokens_do() -> None:
    """A step may end after what its requests had was given up: its tokens come again, and their scores."""
    crowd = Crowd(Costs(step_fixed=0.05, copy_byte=1e-4))  # a step is under way when its request goes
    state, number = crowd.recorder.world.node.state, crowd.until_landing()
    sent = next(s for s in state.devices[0].inflight.values() if number in {r.request.id for r in s.rows})
    request = state.requests[number]
    done = msg.StepDone(sent.id, (1,), 0.1, (msg.Scores(number, len(request.tokens), 0, b"", b"", b""),))
    state.actions = []
    state.tell(done, sent)
    assert [type(action) for action in state.actions] == [ev.Scored]
    request.trusted, state.actions = request.epoch, []
    state.tell(done, sent)
    assert not state.actions


def test_the_former_worker_dies_when_all_has_been_copied() -> None:
    """Host memory outlives workers: the request does not even notice."""
    crowd = Crowd()
    request = crowd.until_landing()
    crowd.until(lambda: not crowd.recorder.world.node.state.requests[request].landing)
    assert crowd.recorder.world.node.state.host_kv.restoring, "its slots are being read"
    crowd.recorder.world.devices[0].kill(restart_after=0.5)
    crowd.finish()
    assert crowd.prefill_tokens(request) == 9


def test_memory_is_short_where_it_goes() -> None:
    """A request that is preempted on its way keeps what host memory has of it, and comes back from there."""
    crowd = Crowd()
    request = crowd.until_landing()
    state = crowd.recorder.world.node.state
    state.actions = []
    state.preempt(state.requests[request], "for a test")
    crowd.recorder.world.node.check()
    assert state.requests[request].saved is not None
    crowd.recorder.world.happen(ev.Tick())
    crowd.finish()
    assert crowd.prefill_tokens(request) == 9


def test_a_failed_step_may_be_the_last_one_before_it_moved() -> None:
    """What that step was to write is not there: the request starts over."""
    crowd = Crowd()
    request = crowd.until_landing()
    moving = crowd.recorder.world.node.state.requests[request]
    assert moving.inflight, "its last step is over already"
    crowd.recorder.world.devices[0].fail_steps = 2  # whichever of the two it is in
    crowd.until(lambda: not moving.landing)
    assert moving.trusted == moving.epoch, "it did not start over"
    crowd.finish()
    assert crowd.prefill_tokens(request) > 9


def test_a_drained_device_hands_on_its_requests() -> None:
    """Nobody is preempted where another replica has room: the device is empty as soon as KV is copied."""
    crowd = Crowd(Costs(), requests=4, migrate_gain=100.0)
    crowd.recorder.world.happen(ev.LoadWanted(9, "a", (1,)))
    crowd.recorder.world.happen(ev.LoadWanted(10, "b", (1,)))
    crowd.until(lambda: {9, 10} <= crowd.recorder.answers.keys())
    crowd.until(lambda: len(crowd.recorder.outputs) == 4)
    assert crowd.moved() == 0
    device = crowd.recorder.world.node.state.devices[0]
    there = sum(len(replica.running) for replica in device.replicas.values())
    crowd.recorder.world.happen(ev.DeviceDrainWanted(11, 0))
    crowd.until(lambda: 11 in crowd.recorder.answers)
    assert not crowd.recorder.finished, "they had ended before"
    assert crowd.moved() == there >= 2
    crowd.finish()
    assert all(crowd.prefill_tokens(request) == 9 for request in crowd.recorder.prompts)


def test_preempted_on_one_device_and_resumed_on_another() -> None:
    """KV in host memory is for every device: who lost its memory goes on wherever there is some first."""
    crowd = Crowd(requests=2, migrate=False)
    crowd.until(lambda: len(crowd.recorder.outputs) == 2)
    state = crowd.recorder.world.node.state
    request = next(r for r in state.requests.values() if r.service == "b")
    crowd.recorder.world.happen(ev.LoadWanted(9, "b", (1,)))
    crowd.until(lambda: 9 in crowd.recorder.answers)
    crowd.recorder.world.happen(ev.DeviceDrainWanted(10, 0))
    state.actions = []
    state.preempt(request, "for a test")
    for action in state.actions:
        if isinstance(action, ev.ToDevice):
            crowd.recorder.world.devices[action.device].receive(action.message)
    crowd.recorder.world.happen(ev.Tick())
    crowd.finish()
    assert crowd.prefill_tokens(request.id) == 9
    assert [(d, m.device) for d, m in crowd.sent if isinstance(m, msg.RestoreBlocks)] == [(1, 0)]


@pytest.mark.parametrize("seed", seeds(4))
def test_requests_move_among_faults(seed: int) -> None:
    """Replicas come readily and requests move readily, on one device or several, while workers die."""
    groups = {"services": PARALLEL, "tensor_parallel": {"pair": 2}} if seed % 2 else {}
    history = History(
        seed,
        (60, 64, 62),
        **groups,  # type: ignore[arg-type]
        replicate_seconds=0.05,
        replicate_gain=1.0,
        migrate_gain=1.0,
        pipeline_depth=1 + seed % 3,
        host_kv=40,
    )
    for _ in range(1000):
        history.act(history.random.choice(ACTIONS + ["arrive"] * 6))
    history.finish()
    assert sum(s.migrations for s in history.world.node.status(0).services) > 10

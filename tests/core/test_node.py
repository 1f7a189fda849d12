"""What a node does in the situations that have a name."""

from __future__ import annotations

from typing import Literal

import pytest

from seallmd.core import events as ev
from seallmd.core import messages
from seallmd.core.arena import Arena
from seallmd.core.ranks import Ranks
from seallmd.core.request import IllegalTransition, Request
from seallmd.core.service import Replica
from seallmd.core.settings import ReplacementSettings
from seallmd.sim.world import Costs
from tests.core.helpers import Recorder, shape, world

MODELS = {"a": shape(), "b": shape(), "c": shape()}


def state_of(recorder: Recorder, name: str) -> str:
    status = recorder.world.node.status(recorder.world.now)
    return next(s.state for s in status.services if s.name == name)


def run(recorder: Recorder, seconds: float) -> None:
    recorder.world.run(until=recorder.world.now + seconds)


def test_one_request() -> None:
    """The plain path: on demand, prefill, decode, length; everything given back."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1, 2, 3), 5)
    recorder.world.run()
    recorder.assert_output(1)
    assert recorder.finished[1].reason == "length"
    assert recorder.world.node.status(0).devices[0].kv_bytes == 0


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    """A long prompt must not stop those that decode."""
    recorder = world({"a": shape()}, step_tokens=8)
    recorder.arrive(1, "a", (1, 2), 30)
    run(recorder, 0.2)
    before = len(recorder.outputs[1])
    recorder.arrive(2, "a", tuple(range(40)), 4)
    while 2 not in recorder.outputs:
        assert recorder.world.step()
    assert len(recorder.outputs[1]) >= before + 4, "the decoding request stood still"
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)


def test_equal_prefixes_are_computed_once() -> None:
    """A finished request's full blocks serve the next one; salts keep prefixes apart."""
    recorder = world({"a": shape()})
    prompt = tuple(range(17))
    for request, salt in ((1, ""), (2, ""), (3, "private")):
        recorder.arrive(request, "a", prompt, 3, salt=salt)
        recorder.world.run()
        recorder.assert_output(request)
    assert recorder.cached == {1: 0, 2: 16, 3: 0}


def test_prefix_reuse_can_be_switched_off() -> None:
    """The baseline of the feature."""
    recorder = world({"a": shape()}, prefix_reuse=False)
    for request in (1, 2):
        recorder.arrive(request, "a", tuple(range(17)), 3)
        recorder.world.run()
    assert recorder.cached == {1: 0, 2: 0}


def test_choices_of_one_prompt_share_its_prefill() -> None:
    """n > 1: the followers wait for the leader's prefill and reuse it."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", tuple(range(20)), 4)
    recorder.arrive(2, "a", tuple(range(20)), 4, leader=1)
    recorder.arrive(3, "a", tuple(range(20)), 4, leader=1)
    recorder.world.run()
    assert recorder.cached == {1: 0, 2: 16, 3: 16}


@pytest.mark.parametrize("scores", [False, True])
def test_the_junior_is_preempted_and_resumes(scores: bool) -> None:
    """Blocks run out: the most junior request gives way, and still ends with the right tokens."""
    recorder = world({"a": shape()}, arenas=(4 + 18,))
    for request in range(1, 5):
        recorder.arrive(request, "a", (request, 2, 3, 4, 5, 6), 25, scores=scores)
    recorder.world.run()
    for request in range(1, 5):
        recorder.assert_output(request)
    assert recorder.world.node.status(0).services[0].preemptions > 0
    assert not any("request 1 preempted" in note for note in recorder.notes), (
        "the most senior never gives way"
    )


def test_scores_need_their_prompt_run() -> None:
    """Who wants log-probabilities of the prompt shares no prefix, but others share theirs."""
    recorder = world({"a": shape()})
    prompt = tuple(range(20))
    for request, scores in ((1, False), (2, True), (3, False)):
        recorder.arrive(request, "a", prompt, 4, scores=scores)
        recorder.world.run()
        recorder.assert_output(request)
    assert recorder.cached == {1: 0, 2: 0, 3: 16}


@pytest.mark.parametrize("step_tokens", [2, 3])
def test_preempted_in_the_middle_of_a_scored_prompt(step_tokens: int) -> None:
    """Each prompt token is scored once, although part of the prompt is run twice."""
    recorder = world({"a": shape()}, arenas=(4 + 18,), step_tokens=step_tokens)
    recorder.arrive(1, "a", tuple(range(36)), 24)
    while 1 not in recorder.outputs:
        run(recorder, 0.01)
    recorder.arrive(2, "a", tuple(range(10, 46)), 8, scores=True)
    while not any("preempted" in note for note in recorder.notes):
        run(recorder, 0.01)
    assert 1 < recorder.scored[2] < 36, "it was to be in the middle of its prompt"
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_pooled_prompt_is_run_and_nothing_drawn(pooling: Literal["mean", "last"]) -> None:
    """In chunks; a mean needs every token run, the last token's state only that one. No token is reserved."""
    recorder = world({"a": shape(context=20)}, step_tokens=8)
    prompt = tuple(range(20))  # as long as the context
    recorder.arrive(1, "a", prompt, 0, pooling=pooling)
    recorder.world.run()
    recorder.assert_output(1)
    assert recorder.world.node.status(0).devices[0].kv_bytes == 0
    before = recorder.world.node.status(0).services[0].cached_tokens
    recorder.arrive(2, "a", prompt, 0, pooling=pooling)
    recorder.arrive(3, "a", prompt[:18], 2)
    recorder.world.run()
    recorder.assert_output(2)
    recorder.assert_output(3)
    after = recorder.world.node.status(0).services[0].cached_tokens
    assert recorder.cached[3] == 16, "what was run for a vector serves others"
    assert after - before == 16 + (16 if pooling == "last" else 0)


def test_preempted_in_the_middle_of_a_pooled_prompt() -> None:
    """Each token's state is told once, although some are run twice."""
    recorder = world({"a": shape()}, arenas=(4 + 18,), step_tokens=3)
    recorder.arrive(1, "a", tuple(range(36)), 24)
    while 1 not in recorder.outputs:
        run(recorder, 0.01)
    recorder.arrive(2, "a", tuple(range(10, 46)), 0, pooling="mean")
    while not any("preempted" in note for note in recorder.notes):
        run(recorder, 0.01)
    assert 0 < recorder.pooled[2] < 36, "it was to be in the middle of its prompt"
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)


def test_a_row_that_fails_ends_its_request() -> None:
    """A grammar that cannot be followed: the client is told why, the others go on, the blocks are free."""
    recorder = world({"a": shape()}, preload=("a",))
    recorder.arrive(1, "a", (1, 2, 3), 8)
    recorder.arrive(2, "a", (4, 5), 8)
    node = recorder.world.node
    (device,) = node.state.devices.values()
    step = next(iter(device.inflight.values()))
    tokens = tuple(7 for row in step.rows if row.sample)
    failed = tuple(messages.RowFailed(row.request.id, "why") for row in step.rows if row.request.id == 1)
    done = messages.StepDone(step.id, tokens, 0.1, (), failed)
    actions = node.handle(ev.FromDevice(0, done), 99.0)
    (finish,) = [action for action in actions if isinstance(action, ev.Finish)]
    assert (finish.request, finish.code, finish.status) == (1, "grammar_failed", 400)
    assert "why" in finish.error
    assert {action.request for action in actions if isinstance(action, ev.Emit)} <= {2}
    assert 1 not in node.state.requests
    node.check()


def test_cancelled_requests_give_back_at_once() -> None:
    """Running or waiting: after the event nothing is held."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1, 2, 3), 30)
    run(recorder, 0.1)
    assert recorder.world.node.status(0).devices[0].kv_bytes > 0
    recorder.world.happen(ev.Cancelled(1))
    assert recorder.world.node.status(0).devices[0].kv_bytes == 0
    assert recorder.finished[1].reason == "cancelled"
    recorder.world.run()


def test_an_idle_service_makes_room() -> None:
    """More models than fit: the longest unused idle one leaves."""
    recorder = world(MODELS, arenas=(27,), min_residency_swaps=0.0)
    for request, name in enumerate("abcab", 1):
        recorder.arrive(request, name, (1, 2, 3), 4)
        recorder.world.run()
        recorder.assert_output(request)
    status = recorder.world.node.status(0)
    assert sum(service.swaps_in for service in status.services) == 5


def test_an_idle_service_that_matters_less_makes_room_first() -> None:
    """Protects what the operator calls important from whoever was used last."""
    for arenas in ((27,), (20, 20)):
        recorder = world(MODELS, arenas, min_residency_swaps=0.0, importance={"a": 2.0})
        for request, name in enumerate("abcbc", 1):
            recorder.arrive(request, name, (1, 2, 3), 4)
            recorder.world.run()
        assert state_of(recorder, "a") == "resident"
        assert recorder.world.node.state.services["a"].swaps_in == 1


def test_a_pinned_service_stays_and_the_newcomer_hears_why() -> None:
    """Refuse, never over-commit, never push out what is pinned."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(23,), pinned=("a",))
    assert state_of(recorder, "a") == "resident"
    recorder.arrive(1, "b", (1, 2, 3), 4)
    recorder.world.run()
    assert recorder.finished[1].status == 503
    assert "pinned" in recorder.finished[1].error
    assert state_of(recorder, "a") == "resident"


def test_a_busy_service_is_asked_to_leave_only_after_patience() -> None:
    """Constant traffic of one model cannot keep another out for ever, nor is it cut off at once."""
    recorder = world(MODELS, arenas=(22,), patience_seconds=1.0, min_residency_swaps=0.0)
    for request in range(100, 160):
        recorder.arrive(request, "a", (request % 50,), 30)
    run(recorder, 0.5)
    recorder.arrive(1, "b", (1, 2, 3), 4)
    run(recorder, 0.5)
    assert state_of(recorder, "a") == "resident"
    recorder.world.run()
    order = list(recorder.finished)
    assert order.index(1) < order.index(159), "the newcomer waited for all of the other's work"
    for request in recorder.prompts:
        recorder.assert_output(request)


def test_waiters_of_one_model_share_one_swap() -> None:
    """Ten requests of an absent model are one load."""
    recorder = world({"a": shape()})
    for request in range(1, 11):
        recorder.arrive(request, "a", (1, request), 3)
    recorder.world.run()
    assert recorder.world.node.status(0).services[0].swaps_in == 1


def test_evict_waits_for_work_and_now_does_not() -> None:
    """The operator's two ways."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1, 2), 10)
    run(recorder, 0.05)
    recorder.world.happen(ev.EvictWanted(1, "a"))
    assert 1 not in recorder.answers
    recorder.world.run()
    recorder.assert_output(1)
    assert recorder.answers[1] == ""
    assert state_of(recorder, "a") == "absent"

    recorder.arrive(2, "a", (1, 2), 10)
    run(recorder, 0.05)
    recorder.world.happen(ev.EvictWanted(2, "a", now=True))
    assert recorder.answers[2] == ""
    assert recorder.finished[2].code == "model_evicted"
    status = recorder.world.node.status(0).devices[0]
    assert status.free_bytes == status.capacity_bytes
    recorder.world.run()


def test_requests_that_come_during_an_evict_bring_the_model_back() -> None:
    """Nothing is lost: they wait for the eviction and then load it again."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1, 2), 20)
    run(recorder, 0.05)
    recorder.world.happen(ev.EvictWanted(1, "a"))
    recorder.arrive(2, "a", (3, 4), 5)
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    assert recorder.answers == {1: ""}
    assert recorder.world.node.status(0).services[0].swaps_in == 2


def test_wrong_commands_are_answered() -> None:
    """Unknown names and wrong states get one line, at once."""
    recorder = world({"a": shape(), "bad": "no such architecture"})
    for ticket, event in enumerate(
        [ev.LoadWanted(1, "x"), ev.EvictWanted(2, "x"), ev.EvictWanted(3, "a"), ev.LoadWanted(4, "bad")], 1
    ):
        recorder.world.happen(event)
        assert (ticket in recorder.answers) == (ticket < 4)
    recorder.world.run()  # a refused model is examined once more: its files may have been mended
    assert "called 'x'" in recorder.answers[1]
    assert recorder.answers[3] == "a is not loaded"
    assert "no such architecture" in recorder.answers[4]


@pytest.mark.parametrize(
    ("service", "prompt", "max_tokens", "code"),
    [
        ("nobody", (1,), 1, "model_not_found"),
        ("a", tuple(range(60)), 5, "context_length_exceeded"),
        ("bad", (1,), 1, "model_unavailable"),
    ],
)
def test_requests_that_cannot_be_served(
    service: str, prompt: tuple[int, ...], max_tokens: int, code: str
) -> None:
    """Refused at once, in OpenAI's words, leaving nothing behind."""
    recorder = world({"a": shape(), "bad": "refused"})
    recorder.arrive(1, service, prompt, max_tokens)
    assert recorder.finished[1].code == code
    assert not recorder.world.node.state.requests


def test_a_load_that_fails_tells_all_waiters_and_pauses() -> None:
    """A circuit breaker: the pause doubles, later requests hear at once how long it lasts."""
    recorder = world({"a": shape()})
    for attempt in range(1, 4):
        recorder.world.devices[0].fail_copies = 1
        recorder.arrive(attempt, "a", (1,), 2)
        run(recorder, 0.2)
        assert "made to fail" in recorder.finished[attempt].error
        recorder.arrive(10 + attempt, "a", (1,), 2)
        assert recorder.finished[10 + attempt].retry_after == pytest.approx(2.0 ** (attempt - 1), abs=0.3)
        run(recorder, 2.0**attempt)
    recorder.arrive(20, "a", (1,), 2)
    recorder.world.run()
    recorder.assert_output(20)


def test_a_lost_worker_s_models_come_back_and_its_requests_go_on() -> None:
    """The other device never notices; no request ends, none has a token twice or not at all."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(24, 24))
    recorder.arrive(1, "a", (1,), 40)
    recorder.arrive(2, "b", (1,), 40)
    run(recorder, 0.05)
    device = recorder.world.node.status(0).services[0].device
    assert device is not None
    recorder.world.devices[device].kill(restart_after=1.0)
    assert not recorder.finished
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    assert state_of(recorder, "a") == "resident"


def test_host_images_stay_within_their_limit() -> None:
    """The least recently used image is dropped, and read again when it is wanted."""
    recorder = world(MODELS, arenas=(64,), host_bytes=2 * shape().weights_bytes)
    for request, name in enumerate("abc", 1):
        recorder.arrive(request, name, (1,), 2)
        recorder.world.run()
    images = [s.image.value for s in recorder.world.node.state.services.values()]
    assert images == ["none", "ready", "ready"]


def test_host_images_stay_within_their_limit_when_all_are_wanted_at_once() -> None:
    """One after the other then, each used before it goes. They were all built at once, dropped for each other
    before they had been copied, and built again."""
    large, names = shape(segments=(40 * 256,)), "abcdef"
    recorder = world(
        dict.fromkeys(names, large),
        arenas=(60,),
        host_bytes=large.weights_bytes * 3 // 2,
        costs=Costs(step_fixed=0.1, read_byte=2e-5, copy_byte=2e-5),
        replacement=ReplacementSettings(enabled=False),
    )
    services = recorder.world.node.state.services.values()
    for request in range(1, 5):
        recorder.arrive(request, "a", (request,), 60)
    run(recorder, 1.0)
    for request, name in enumerate(names[1:], 5):
        recorder.arrive(request, name, (1,), 3)
    builds = 0
    while len(recorder.finished) < 9:
        before = [service.image.value for service in services]
        assert recorder.world.step()
        held = [service.image.value for service in services]
        assert held.count("ready") + held.count("building") <= 1
        builds += held.count("building") > before.count("building")
    assert builds <= 10, "five, and the first again between two of them"


def test_draining_refuses_newcomers_and_finishes_the_rest() -> None:
    """SIGTERM: what was accepted is finished; with `now`, it fails with a reason."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1,), 30)
    recorder.arrive(2, "a", (2,), 30)
    run(recorder, 0.05)
    recorder.world.happen(ev.DrainWanted())
    recorder.arrive(3, "a", (3,), 3)
    assert recorder.finished[3].status == 503
    recorder.world.run()
    recorder.assert_output(1)
    recorder.world.happen(ev.DrainWanted(now=True))


def test_illegal_transitions_raise_and_change_nothing() -> None:
    """Life cycles are tables."""
    replica = Replica("a", (0,), Ranks([Arena(1)]), ((0,),), 1, 0.0)
    with pytest.raises(IllegalTransition):
        replica.move("drain")
    assert replica.stage.value == "copying"
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1,), 3)
    request: Request = recorder.world.node.state.requests[1]
    with pytest.raises(IllegalTransition):
        request.move("preempt")
    assert request.life.value == "waiting"
    recorder.world.run()


def test_a_step_behind_a_failed_one_teaches_nothing() -> None:
    """The worker leaves out rows of requests that failed: such a step says nothing of costs."""
    recorder = world({"a": shape()})
    recorder.arrive(1, "a", (1, 2, 3), 50)
    run(recorder, 0.3)
    profile = recorder.world.node.state.services["a"].profile
    assert profile is not None
    recorder.world.devices[0].fail_steps = 1
    recorder.world.run()
    recorder.assert_output(1)
    told = [event.message for _, event in recorder.world.history if isinstance(event, ev.FromDevice)]
    done = sum(isinstance(message, messages.StepDone) for message in told)
    assert profile.costs.steps == done - 1 > 0

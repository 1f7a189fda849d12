"""Every policy serves everything, and what profiles learn."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.messages import Probed
from seallmd.core.node import Node
from seallmd.core.outlook import look
from seallmd.core.profile import Lengths, ServiceProfile
from seallmd.core.request import SavedKv
from tests.core.helpers import shape, world

CPU = ROOFLINES["cpu"]


def test_policies_are_all_reachable_and_serve_everything() -> None:
    """Each name in the configuration is a policy that finishes its requests."""
    for policy in ("budget", "round-robin", "fcfs"):
        recorder = world({"a": shape(), "b": shape()}, policy=policy)
        for request in range(1, 7):
            recorder.arrive(request, "ab"[request % 2], (request, 2), 10)
        recorder.world.run()
        for request in range(1, 7):
            recorder.assert_output(request)


def test_step_costs_are_learnt() -> None:
    """From a wrong guess to within 5% of what is measured, with 10% of noise."""
    rng = random.Random(0)
    costs = StepCosts.guess(CPU, shape())

    def truth(tokens: int, context: int, rows: int) -> float:
        return 0.05 + 0.004 * (tokens - rows) + 0.00002 * context + 0.006 * rows

    for _ in range(500):
        rows = rng.randint(1, 32)
        tokens, context = rows + rng.choice((0, 0, rng.randint(1, 200))), rng.randint(1, 8000)
        costs.learn(tokens, context, rows, truth(tokens, context, rows) * rng.uniform(0.9, 1.1))
    for step in ((1, 100, 1), (16, 4000, 16), (32, 8000, 32), (200, 200, 1), (220, 3000, 20)):
        assert costs.predict(*step) == pytest.approx(truth(*step), rel=0.05)
    assert costs.predict(16, 4000) == costs.predict(16, 4000, 16)
    assert costs.error < 0.08


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_one_answer_alone_teaches_step_costs(noise: float) -> None:
    """Steps whose context grows by a token tell coefficients badly apart: none may run away for that."""
    rng = random.Random(0)
    costs = StepCosts.known(0.013, 0.0, 4.4e-7, 7e-5, unsure=50)  # guessed for one rank, run on two
    for context in range(134, 1000):
        seconds = 0.0088 + 2.2e-7 * context
        if context > 140:
            assert costs.predict(1, context) == pytest.approx(seconds, rel=0.01 + 2 * noise)
        costs.learn(1, context, 1, seconds * rng.uniform(1 - noise, 1 + noise))
    assert costs.predict(8, 4000) < 4 * seconds


def test_step_costs_follow_a_change() -> None:
    """A device that gets slower (another process took a core) is noticed."""
    costs = StepCosts.guess(CPU, shape())
    for _ in range(300):
        costs.learn(8, 1000, 8, 0.1)
    for _ in range(300):
        costs.learn(8, 1000, 8, 0.3)
    assert costs.predict(8, 1000) == pytest.approx(0.3, rel=0.15)


def test_lengths_are_learnt_from_requests_that_ended() -> None:
    """The mean of what was seen, not the first guess."""
    profile = ServiceProfile(StepCosts.guess(CPU, shape()))
    for _ in range(200):
        profile.ended(prompt=50, output=20)
    assert profile.output_tokens == pytest.approx(20, rel=0.1)
    assert profile.prompt_tokens == pytest.approx(50, rel=0.1)


def test_the_distribution_of_lengths_is_learnt_and_follows() -> None:
    """Quantiles to within the width of a bin; what was long ago counts for little."""
    lengths, rng = Lengths(), random.Random(1)
    assert lengths.quantile(0.5) == 0.0
    for _ in range(300):
        lengths.add(1000)
    for _ in range(1000):
        lengths.add(int(rng.lognormvariate(5.0, 0.8)))
    assert lengths.quantile(0.5) == pytest.approx(148, rel=0.35)
    assert lengths.quantile(0.95) == pytest.approx(553, rel=0.45)
    assert sum(lengths.bins) < 51


def test_rates_outlive_the_daemon() -> None:
    """A node that is started again expects of each service what it was asked for before."""
    recorder = world({"a": shape(), "b": shape()})
    for request in range(1, 31):
        recorder.arrive(request, "a", (request,), 2)
        recorder.world.run(until=recorder.world.now + 0.5)
    kept = recorder.world.node.profiles()
    assert kept["a"].requests_per_second > 0.3
    again = Node(replace(recorder.world.node.state.settings, profiles=kept))
    again.handle(ev.FromHostProcess(Probed("a", "/a", shape())), 100.0)
    arrivals = again.state.services["a"].arrivals
    assert arrivals.value(100.0) == pytest.approx(kept["a"].requests_per_second)
    assert arrivals.value(1000.0) < 1e-3


def test_a_part_of_a_prompt_draws_no_token() -> None:
    """Rows are those that draw: a chunk of a long prompt teaches what prompts cost, nothing of rows."""
    costs = StepCosts.known(0.01, 0.002, 0.0, 0.001)
    recorder = world({"a": shape()}, step_tokens=8)
    profile = recorder.world.node.state.services["a"].profile
    assert profile is not None
    profile.costs = costs
    seen: list[tuple[int, int]] = []
    learn = profile.stepped

    def stepped(tokens: int, rows: int, context: int, seconds: float) -> None:
        seen.append((tokens, rows))
        learn(tokens, rows, context, seconds)

    recorder.world.node.state.services["a"].profile = spy = _Spy(profile, stepped)
    recorder.arrive(1, "a", tuple(range(20)), 2)
    recorder.world.run()
    assert seen == [(8, 0), (8, 0), (4, 1), (1, 1)]
    assert spy.rows == 1.0


class _Spy:
    """A profile whose `stepped` is listened to."""

    def __init__(self, profile: ServiceProfile, stepped: object) -> None:
        self._profile = profile
        self.stepped = stepped

    def __getattr__(self, name: str) -> object:
        return getattr(self._profile, name)


def test_what_comes_back_from_host_memory_is_one_token_of_work() -> None:
    """A preempted request whose KV was kept is not weighed as if its prompt had to be run again."""
    recorder = world({"a": shape()}, (200,))
    recorder.arrive(1, "a", tuple(range(30)), 20)
    recorder.world.run(until=recorder.world.now + 0.2)
    state = recorder.world.node.state
    request, (replica,) = state.requests[1], state.services["a"].replicas
    again, kept = dict(replica.running), len(request.tokens) - 1
    replica.running.clear()
    state.services["a"].waiting[request.order] = request
    request.scheduled, scheduled = 0, request.scheduled
    request.drawn, drawn = len(request.tokens) - request.prompt, request.drawn
    whole = look(state, replica)
    request.saved = SavedKv(request.id, replica.devices, ([],), kept, copying=set())
    one = look(state, replica)
    request.saved = SavedKv(request.id, (7,), ([],), kept, copying={7})
    assert look(state, replica) == whole  # beside another device it is of no use
    assert one.worth(state.now, 2.0) < whole.worth(state.now, 2.0)
    assert one.seconds < whole.seconds
    profile = state.services["a"].profile
    assert profile is not None
    assert one.seconds == profile.costs.predict(1, kept + 1)
    request.saved, request.scheduled, request.drawn = None, scheduled, drawn
    del state.services["a"].waiting[request.order]
    replica.running.update(again)
    recorder.world.run()


def test_an_outlook_that_is_out_of_date_is_found() -> None:
    """Protects cheap decisions from becoming wrong ones: what is kept is compared with what is there."""
    names = "abcd"
    recorder = world({name: shape() for name in names}, (200,), preload=tuple(names), policy="budget")
    for request, name in enumerate(names, 1):
        recorder.arrive(request, name, tuple(range(10)), 40)
    recorder.world.run(until=recorder.world.now + 0.1)
    node, services = recorder.world.node, recorder.world.node.state.services
    node.check()
    kept = next(request for request in node.state.requests.values() if services[request.service].outlooks)
    kept.attained += 1.0
    with pytest.raises(AssertionError, match="nobody was told"):
        node.check()
    services[kept.service].changed()
    node.check()

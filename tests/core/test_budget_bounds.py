"""The doubling budget's bounds, and how long `budget` may leave a service without a step."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from seallmd.core import events as ev
from seallmd.core.cost import StepCosts
from seallmd.core.messages import Sampling, Step
from seallmd.core.profile import ServiceProfile
from seallmd.core.scheduler import charge
from seallmd.core.settings import NodeSettings, PolicySettings, ServiceSettings
from seallmd.core.state import Request
from seallmd.sim.world import Costs, World
from tests.core.helpers import BLOCK, shape

FIXED, TOKEN = 0.01, 0.0002  # seconds of a step, and of each token in it
CONTEXT = 4096
SERVICES = ("a", "b", "c", "d")


def known_profile() -> ServiceProfile:
    """A profile that predicts the steps of `Costs(FIXED, TOKEN)` exactly, and does not doubt it."""
    return ServiceProfile(StepCosts.known(FIXED, TOKEN, 0.0, TOKEN), output_tokens=20.0)


# ------------------------------------------------------------------------------------- the budget


@given(
    tokens=st.integers(1, 2000),
    budget=st.floats(1e-3, 1e3),
    token_seconds=st.floats(1e-4, 1e2),
    slower=st.floats(0.1, 10),
)
def test_doublings_and_last_budget(tokens: int, budget: float, token_seconds: float, slower: float) -> None:
    """Protects SeaLLM's bounds, whatever a token costs, and also when that changes on the way.

    With p the execution time needed and b the first budget: at most max(0, ceil(log2(p / b))) doublings, a
    last budget below 2 max(b, p), and never one that is used up.
    """
    request = Request(
        id=1, service="a", order=1, arrived=0.0, tokens=[1], prompt=1, max_tokens=tokens,
        sampling=Sampling(), stop_ids=frozenset(), root=None, leader=0, budget=budget,
    )  # fmt: skip
    for token in range(tokens):
        seconds = token_seconds * (slower if token > tokens // 2 else 1.0)
        charge(request, seconds)
        assert request.attained <= request.budget
    needed = request.attained
    assert request.budget == budget * 2**request.doublings
    assert request.doublings == 0 or budget * 2 ** (request.doublings - 1) < needed
    assert request.budget <= 2 * max(budget, needed)
    assert request.doublings <= max(0, math.ceil(math.log2(needed / budget) * (1 + 1e-12)))


def test_a_right_guess_is_never_doubled() -> None:
    """Protects the request that takes as long as its budget said: its rank stays."""
    profile = known_profile()
    request = Request(
        id=1, service="a", order=1, arrived=0.0, tokens=[1], prompt=1, max_tokens=20,
        sampling=Sampling(), stop_ids=frozenset(), root=None, leader=0,
    )  # fmt: skip
    request.budget = profile.request_seconds(prompt=1)
    for _ in range(20):
        charge(request, profile.token_seconds())
    assert request.doublings == 0
    charge(request, profile.token_seconds())  # its prompt's share is left over
    charge(request, profile.token_seconds())
    assert request.doublings == 1


# ------------------------------------------------------------------------------------- the gap


@dataclass
class Watch:
    """Follows a world: since when each service has had work without a step, and the longest such time.

    longest_step: of all steps that were sent, in seconds.
    """

    since: dict[str, float] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    longest_step: float = 0.0
    services: dict[int, str] = field(default_factory=dict)
    world: World = field(init=False)

    def observe(self, event: ev.Event, actions: list[ev.Action]) -> None:
        if isinstance(event, ev.Arrived):
            self.services[event.request] = event.service
            self.left[event.service] += 1
            self.since.setdefault(event.service, self.world.now)
        for action in actions:
            if isinstance(action, ev.Finish):
                service = self.services[action.request]
                self.left[service] -= 1
                if not self.left[service]:
                    del self.since[service]
            elif isinstance(action, ev.ToDevice) and isinstance(action.message, Step):
                self._stepped(action.message)

    def _stepped(self, step: Step) -> None:
        tokens = sum(row.count for row in step.rows)
        self.longest_step = max(self.longest_step, FIXED + TOKEN * tokens)
        waited = self.world.now - self.since[step.service]
        self.waits[step.service] = max(self.waits[step.service], waited)
        self.since[step.service] = self.world.now


Work = tuple[float, str, int, int]  # when, for whom, tokens of the prompt and of the answer


def watched(work: list[Work], max_gap_rounds: float, ageing: float = 2.0) -> Watch:
    """The real node on one device with room for everything, one step at a time, costs known beforehand."""
    watch = Watch()
    policy = PolicySettings(
        max_gap_rounds=max_gap_rounds, ageing=ageing, pipeline_depth=1, prefix_reuse=False, replicate=False
    )
    node = NodeSettings(
        services=tuple(ServiceSettings(name=name, model=name, preload=True) for name in SERVICES),
        devices=1,
        block_bytes=BLOCK,
        host_bytes=1 << 30,
        policy=policy,
        profiles={name: known_profile() for name in SERVICES},
    )
    shapes = {name: shape(context=CONTEXT) for name in SERVICES}
    lengths: dict[int, int] = {}
    watch.world = World(
        node, dict(shapes), (BLOCK * 100_000,), Costs(FIXED, TOKEN), watch.observe, lengths=lengths
    )
    watch.world.start()
    watch.world.run()
    began = watch.world.now
    for number, (when, service, prompt, output) in enumerate(sorted(work), 1):
        watch.world.run(until=began + when)
        lengths[number] = prompt + output
        watch.world.happen(ev.Arrived(number, service, (number,) * prompt, output, Sampling(temperature=0.0)))
    watch.world.run()
    assert not watch.since, "a request was never finished"
    return watch


WORK = st.lists(
    st.tuples(
        st.floats(0, 2), st.sampled_from(SERVICES), st.sampled_from((1, 30, 600, 2000)), st.integers(1, 60)
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=40)
@given(work=WORK, rounds=st.sampled_from((1.0, 1.5, 4.0)))
def test_no_service_waits_longer_than_the_gap(work: list[Work], rounds: float) -> None:
    """Protects against starvation: `max_gap_rounds` rounds, a step of each other service, the one running.

    Those that have waited too long take turns among themselves, hence the steps of the others.
    """
    watch = watched(work, rounds)
    services = len({service for _, service, _, _ in work})
    for service, waited in watch.waits.items():
        limit = (rounds * services + (services - 1) + 1) * watch.longest_step
        assert waited <= limit + 1e-9, (
            f"{service} waited {waited / watch.longest_step:.1f} of the longest steps"
        )


def test_the_gap_is_what_bounds_it() -> None:
    """Protects the test above from being true of any policy: without gap and ageing, density starves."""
    crowd: list[Work] = [(0.01 * n, "a", 1, 60) for n in range(100)]
    work = [*crowd, (0.5, "b", 1, 5)]
    bounded, unbounded = watched(work, 1.0, 0.0), watched(work, 1000.0, 0.0)
    assert bounded.waits["b"] <= 4 * bounded.longest_step
    assert unbounded.waits["b"] > 50 * unbounded.longest_step

"""The doubling budget's bounds, the gap bound, and what profiles learn."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.events import ToDevice
from seallmd.core.messages import Step
from seallmd.core.profile import ServiceProfile
from seallmd.core.scheduler import charge
from seallmd.core.settings import ServiceSettings
from seallmd.core.state import Request, Service
from tests.core.helpers import shape, world

CPU = ROOFLINES["cpu"]


@given(
    tokens=st.integers(1, 3000),
    mean_output=st.floats(1, 2000),
    prompt=st.integers(1, 4000),
)
def test_bounds_of_the_doubling_budget(tokens: int, mean_output: float, prompt: int) -> None:
    """At most ceil(log2(p / b)) doublings; the last budget is below 2 max(b, p), one token's charge aside."""
    service = Service(ServiceSettings(name="a", model="a"), shape=shape())
    service.profile = ServiceProfile(StepCosts.guess(CPU, shape()), output_tokens=mean_output)
    first = service.profile.request_seconds(prompt)
    request = Request(1, "a", 1, 0.0, [1], 1, tokens, None, frozenset(), None, 0, budget=first)  # type: ignore[arg-type]
    for _ in range(tokens):
        charge(request, service)
    needed = request.attained
    assert request.budget > request.attained or math.isclose(request.budget, request.attained)
    assert request.doublings <= max(0, math.ceil(math.log2(needed / first) + 1e-9) + 1)
    assert request.budget <= 2 * max(first, needed) * (1 + 1e-9)


def test_no_service_waits_longer_than_the_gap() -> None:
    """A service that `budget` ranks low still gets a step within so many rounds."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(200,), policy="budget", max_gap_rounds=4)
    steps: dict[str, list[float]] = {"a": [], "b": []}
    follow = recorder.world._observe

    def observe(event: object, actions: list[object]) -> None:
        for action in actions:
            if isinstance(action, ToDevice) and isinstance(action.message, Step):
                steps[action.message.service].append(recorder.world.now)
        follow(event, actions)  # type: ignore[misc, arg-type]

    recorder.world._observe = observe  # type: ignore[assignment]
    for request in range(1, 9):
        recorder.arrive(request, "a", (request,), 40)
    recorder.arrive(9, "b", (1, 2, 3), 40)
    recorder.world.run()
    for name, times in steps.items():
        longest = max(b - a for a, b in pairwise(times))
        # Steps take 10 to 20 ms here, two services, and steps that are on their way already count too.
        assert longest <= 4 * 2 * 0.02 + 3 * 0.02, f"{name} waited {longest:.3f} s"
    recorder.assert_output(9)


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
        return 0.05 + 0.004 * tokens + 0.00002 * context + 0.006 * rows

    for _ in range(500):
        rows = rng.randint(1, 32)
        tokens, context = rows + rng.choice((0, 0, rng.randint(1, 200))), rng.randint(1, 8000)
        costs.learn(tokens, context, rows, truth(tokens, context, rows) * rng.uniform(0.9, 1.1))
    for step in ((1, 100, 1), (16, 4000, 16), (32, 8000, 32), (200, 200, 1), (220, 3000, 20)):
        assert costs.predict(*step) == pytest.approx(truth(*step), rel=0.05)
    assert costs.predict(16, 4000) == costs.predict(16, 4000, 16)
    assert costs.error < 0.08


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

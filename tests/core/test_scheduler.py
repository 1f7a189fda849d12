"""Every policy serves everything, and what profiles learn."""

from __future__ import annotations

import random

import pytest

from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.profile import ServiceProfile
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

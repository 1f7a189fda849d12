"""Placements that are made before a run, and loaded as an operator would."""

from __future__ import annotations

import pytest

from seallmd.core.cost import ROOFLINES
from seallmd.core.plan import Plan
from seallmd.sim import experiment, static
from seallmd.sim.experiment import Setup
from seallmd.sim.models import SimError, parse_models
from seallmd.sim.workload import Arrival, Lengths, synthetic

CPU, A100 = ROOFLINES["cpu"], ROOFLINES["a100-80g"]


def setup(placement: str) -> Setup:
    """One model that gets nearly all requests, and one beside it, on three devices."""
    shapes = parse_models("2*smollm2-135m")
    lengths = Lengths(60, 20)
    arrivals = synthetic(list(shapes), rate=15, seconds=3, alpha=3.0, seed=1, lengths=lengths)
    return Setup(shapes, (CPU,) * 3, arrivals, policy="round-robin", placement=placement)


def plan_of(setup: Setup) -> Plan:
    arenas = [int(device.memory_bytes * setup.arena_share) for device in setup.devices]
    return static.alpa(setup.shapes, setup.devices[0], arenas, setup.arrivals, max_rows=64)


def test_a_static_placement_is_loaded_before_the_first_request_and_stays() -> None:
    """Protects the baseline: all its replicas are there from the start, and nothing moves after that."""
    static_setup = setup("alpa")
    replicas = sum(len(groups) for groups in plan_of(static_setup).replicas.values())
    assert replicas > len(static_setup.shapes), "this is to test several replicas of one service"
    run = experiment._Run(static_setup)
    outcome = run.run(lambda _: None)
    assert outcome.swaps == 0
    assert not any(served.error for served in outcome.served)
    there = run._world.node.state.services
    assert {name: {r.devices for r in there[name].replicas} for name in there} == {
        name: set(groups) for name, groups in plan_of(static_setup).replicas.items()
    }


def test_demand_alone_makes_no_plans() -> None:
    """Protects the row that shows what plans are worth: same node, no search."""
    outcome = experiment.run(setup("demand"))
    assert not any(served.error for served in outcome.served)


def test_what_a_static_placement_has_no_room_for_is_said() -> None:
    """Protects comparisons from a baseline that leaves out the largest model."""
    shapes = parse_models("llama-65b")
    arrivals = [Arrival(0.0, "llama-65b-1", 10, 2), Arrival(1.0, "llama-65b-1", 10, 2)]
    with pytest.raises(SimError, match="llama-65b-1"):
        experiment.run(Setup(shapes, (A100,), arrivals, placement="alpa"))


def test_other_placements_are_refused() -> None:
    """Protects people from a run of something else than they asked for."""
    with pytest.raises(SimError, match="placement"):
        experiment.run(setup("luck"))

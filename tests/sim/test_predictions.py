"""Planning's predictions against the simulator: two models of one machine that share step costs alone."""

from __future__ import annotations

import statistics

import pytest

from seallmd.core.cost import StepCosts
from seallmd.core.latency import estimate
from seallmd.core.plan import Demand, Machine, Plan, Split
from seallmd.core.settings import PolicySettings
from seallmd.sim.experiment import Setup, run
from seallmd.sim.models import parse_devices, parse_models
from seallmd.sim.workload import Lengths, synthetic


@pytest.mark.parametrize(("models", "rate"), [("1*llama-7b", 2.0), ("3*llama-7b", 1.5)])
def test_predicted_latency_is_what_the_simulator_finds(models: str, rate: float) -> None:
    """Protects the estimator from drifting away from the system: plans are only as good as it is."""
    seconds = 60.0
    shapes, (device,) = parse_models(models), parse_devices("1*a100-80g")
    lengths = Lengths(prompt=160, output=120, sigma=0.6)
    arrivals = synthetic(list(shapes), rate=rate, seconds=seconds, alpha=0.5, seed=0, lengths=lengths)
    settings = PolicySettings(replicate=False)
    outcome = run(Setup(shapes, (device,), arrivals, policy="round-robin", limits=settings))
    demands = []
    for name, shape in shapes.items():
        own = [arrival for arrival in arrivals if arrival.service == name]
        costs = StepCosts.guess(device, shape)
        split = Split.of(1, shape.weights_bytes, shape.kv_bytes_per_token, costs)
        prompt = statistics.mean(arrival.prompt for arrival in own)
        output = statistics.mean(arrival.output for arrival in own)
        demands.append(Demand(name, len(own) / seconds, prompt, output, (split,)))
    machine = Machine((device.memory_bytes,), device.copy_bytes_per_second)
    found = estimate(Plan(dict.fromkeys(shapes, ((0,),))), demands, machine).services
    predicted = sum(d.rate * found[d.name].seconds for d in demands) / sum(d.rate for d in demands)
    simulated = statistics.mean(record.finished - record.arrived for record in outcome.served)
    assert predicted == pytest.approx(simulated, rel=0.2)

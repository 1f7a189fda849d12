"""Placements that are made once, before the first request, by somebody who knows the whole trace.

Owns the way from the arrivals of a run to a plan. Must not search (`core.baselines`) nor carry a plan out
(`sim.experiment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from seallmd.core import baselines
from seallmd.core.cost import Roofline, StepCosts
from seallmd.core.latency import estimate
from seallmd.core.plan import Demand, Machine, Plan, Split
from seallmd.core.shapes import ModelShape
from seallmd.sim.models import SimError
from seallmd.sim.workload import Arrival, fitted


def alpa(
    shapes: Mapping[str, ModelShape],
    device: Roofline,
    arena_bytes: Sequence[int],
    arrivals: Sequence[Arrival],
    max_rows: int,
) -> Plan:
    """AlpaServe's greedy for the mean rates and lengths of all arrivals: more than its own forecasts know.

    Of its plans for the sizes of groups, the best of those with a place for every service. Raises SimError
    when none has: there is nothing to swap the others in.
    """
    demands = _demands(shapes, device, arrivals)
    machine = Machine(tuple(arena_bytes), device.copy_bytes_per_second, max_rows=max_rows)
    plans = [baselines.alpa(demands, replace(machine, sizes=(size,))) for size in machine.sizes]
    whole = [plan for plan in plans if all(plan.of(demand.name) for demand in demands)]
    if not whole:
        absent = sorted({d.name for plan in plans for d in demands if not plan.of(d.name)})
        raise SimError(f"a static placement has no room for all of {', '.join(absent)}")
    return min(whole, key=lambda plan: estimate(plan, demands, machine).normalized_latency)


def _demands(shapes: Mapping[str, ModelShape], device: Roofline, arrivals: Sequence[Arrival]) -> list[Demand]:
    seconds = max(1.0, arrivals[-1].seconds)
    found = []
    for name, shape in shapes.items():
        own = [fitted(arrival, shape.context) for arrival in arrivals if arrival.service == name]
        if own:
            prompt, output = np.mean([(a.prompt, a.output) for a in own], axis=0)
            splits = tuple(_split(shape, device, r) for r in (1, *(s.ranks for s in shape.shards)))
            found.append(Demand(name, len(own) / seconds, float(prompt), float(output), splits))
    return found


def _split(shape: ModelShape, device: Roofline, ranks: int) -> Split:
    weights = sum(shape.shard(ranks).segments)
    return Split.of(ranks, weights, shape.kv_bytes_per_token / ranks, StepCosts.guess(device, shape, ranks))

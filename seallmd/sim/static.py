"""Placements that are made once, before the first request, by somebody who knows the whole trace.

Owns the way from the arrivals of a run to a plan. Must not search (`core.baselines`) nor carry a plan out
(`sim.experiment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from seallmd.core import baselines
from seallmd.core.cost import Roofline, StepCosts
from seallmd.core.messages import ModelShape
from seallmd.core.plan import Demand, Machine, Plan, Split
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

    Raises SimError when a service that is asked for gets no place: there is nothing to swap it in.
    """
    demands = _demands(shapes, device, arrivals)
    plan = baselines.alpa(
        demands, Machine(tuple(arena_bytes), device.copy_bytes_per_second, max_rows=max_rows)
    )
    if absent := [demand.name for demand in demands if not plan.of(demand.name)]:
        raise SimError(f"the static placement has no room for {', '.join(absent)}")
    return plan


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

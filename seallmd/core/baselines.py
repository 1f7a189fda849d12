"""Plans as others make them, to measure `core.placement` against.

Owns two planners of the same signature as `place`: AlpaServe's greedy and one service per device. They see
the same predictions and honour nothing that the operator placed.
"""

from __future__ import annotations

from collections.abc import Sequence

from seallmd.core.latency import Work, estimate
from seallmd.core.plan import Demand, Devices, Machine, Plan, broken, groups_of

_SLO_SCALE = 5.0  # times the latency alone: what is slower counts as unserved


def one_each(demands: Sequence[Demand], machine: Machine) -> Plan:
    """A device (or as few as it needs) for each service in descending rate, until there are none left."""
    free = set(range(len(machine.arena_bytes)))
    plan = Plan({demand.name: () for demand in demands})
    for demand in sorted(demands, key=lambda d: (-d.rate, d.name)):
        groups = (group for split in demand.splits for group in groups_of(machine, split.ranks))
        for group in groups:
            with_it = _with(plan, demand.name, group)
            if free.issuperset(group) and not broken(with_it, demands, machine):
                plan = with_it
                free.difference_update(group)
                break
    return plan


def alpa(demands: Sequence[Demand], machine: Machine) -> Plan:
    """AlpaServe's greedy (OSDI 2023, algorithm 1), for each size of group; the best of these plans.

    It simulates where this predicts: a service is unserved by how far its latency exceeds the target.
    """
    sizes = [size for size in machine.sizes if groups_of(machine, size)]
    plans = [_greedy(demands, machine, groups_of(machine, size)) for size in sizes]
    if not plans:
        return Plan({demand.name: () for demand in demands})
    return min(plans, key=lambda plan: estimate(plan, demands, machine).normalized_latency)


def _greedy(demands: Sequence[Demand], machine: Machine, groups: list[Devices]) -> Plan:
    """One replica more for the service with most requests unserved, on the least loaded group it fits on."""
    plan = Plan({demand.name: () for demand in demands})
    stuck: set[str] = set()
    loads = dict.fromkeys(groups, 0.0)
    while True:
        unserved = {
            name: rate for name, rate in _unserved(plan, demands, machine).items() if name not in stuck
        }
        worst = max(unserved, key=lambda name: (unserved[name], name), default=None)
        if worst is None or unserved[worst] <= 0:
            return plan
        for group in sorted(groups, key=lambda group: (loads[group], group)):
            if group in plan.of(worst):
                continue
            with_it = _with(plan, worst, group)
            if not broken(with_it, demands, machine):
                plan = with_it
                break
        else:
            stuck.add(worst)
        loads = _loads(plan, demands, machine, groups)


def _with(plan: Plan, service: str, group: Devices) -> Plan:
    return Plan({**plan.replicas, service: (*plan.of(service), group)})


def _unserved(plan: Plan, demands: Sequence[Demand], machine: Machine) -> dict[str, float]:
    """Requests per second that miss the target: all of an absent service, else as the latency exceeds it."""
    found = estimate(plan, demands, machine).services
    return {
        d.name: d.rate * (1 - min(1.0, _SLO_SCALE / found[d.name].slowdown)) if plan.of(d.name) else d.rate
        for d in demands
    }


def _loads(
    plan: Plan, demands: Sequence[Demand], machine: Machine, groups: list[Devices]
) -> dict[Devices, float]:
    loads = dict.fromkeys(groups, 0.0)
    for demand in demands:
        for group in plan.of(demand.name):
            split = demand.split(len(group))
            if split is not None:
                loads[group] += Work.of(demand, split, machine).load() / len(plan.of(demand.name))
    return loads

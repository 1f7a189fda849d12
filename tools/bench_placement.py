"""How good and how fast planning is: against all plans there are on small machines, by the clock on large.

    python -m tools.bench_placement [--cases N] [--seed N] [--devices N] [--services N]

Draws random services and machines, predicts the best plan found and the best of all, and prints the ratio of
their normalized latencies (1 = as good as can be): median, P95 and worst. "all plans" includes those whose
groups overlap, which the search tries in the end only. Rivals: `alpa` (AlpaServe's greedy) and `one_each`.
Then the seconds of processor time of `place` for large machines. Needs no GPU: planning knows predictions
alone, and so does this.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from seallmd.core.baselines import alpa, one_each
from seallmd.core.latency import estimate
from seallmd.core.placement import place
from seallmd.core.plan import Demand, Devices, Machine, Plan, Split, broken

_GIB = 1 << 30
_BYTES_PER_SECOND, _FLOPS = 1.2e12, 190e12  # of one device, as reached
_COPY_BYTES_PER_SECOND = 24e9
# Devices, services, requests per second and device.
_LARGE = ((1, 8, 1.0), (2, 12, 1.0), (4, 12, 1.0), (8, 40, 0.5), (8, 40, 2.0), (32, 19, 2.0))

Case = tuple[list[Demand], Machine]
Planner = Callable[[Sequence[Demand], Machine], Plan]


def service(name: str, rate: float, billions: float, prompt: float, output: float, arena: int) -> Demand:
    """A float16 model of so many parameters, at all ranks that fill less than 0.9 of an arena each."""
    weights = int(billions * 2e9)
    kv = 128 * 1024 * (billions / 8) ** 0.6
    splits = []
    for ranks in (1, 2, 4, 8):
        speed = ranks**0.85  # what talking to each other leaves of the ranks
        fixed = 0.002 + weights / _BYTES_PER_SECOND / speed
        token, context = weights / _FLOPS / speed, kv / _BYTES_PER_SECOND / speed
        splits.append(Split(ranks, weights // ranks, kv / ranks, fixed, token, context, token))
    fitting = tuple(split for split in splits if split.weights_bytes < 0.9 * arena)
    return Demand(name, rate, prompt, output, fitting or tuple(splits[-1:]), least_tokens=1024)


def draw(seed: int, devices: int, services: int, load: float | None = None) -> Case:
    """A random case: skewed rates, models of 1 to 30 billion, devices of one or two sizes."""
    chance = random.Random(seed)
    sizes = [chance.choice((24, 48, 80)) * _GIB] * devices
    if devices > 1 and chance.random() < 0.3:
        sizes[0] //= 2
    total = devices * (load or chance.choice((0.1, 0.5, 1.0, 2.0, 4.0)))
    shares = [(i + 1) ** -0.9 for i in range(services)]
    demands = [
        service(
            f"service-{i}",
            total * share / sum(shares),
            chance.choice((1, 3, 8, 8, 13, 30)),
            chance.uniform(50, 1000),
            chance.uniform(20, 500),
            max(sizes),
        )
        for i, share in enumerate(chance.sample(shares, services))
    ]
    return demands, Machine(tuple(sizes), _COPY_BYTES_PER_SECOND)


def all_plans(demands: Sequence[Demand], machine: Machine) -> Iterator[Plan]:
    """Every plan that can exist, groups in ascending order of devices; devices are taken as all different."""
    options = [list(_options(demand, machine)) for demand in demands]
    names = [demand.name for demand in demands]
    for chosen in itertools.product(*options):
        plan = Plan(dict(zip(names, chosen, strict=True)))
        if not broken(plan, demands, machine):
            yield plan


def _options(demand: Demand, machine: Machine) -> Iterator[tuple[Devices, ...]]:
    """Every set of disjoint groups that a service can run on."""
    devices = range(len(machine.arena_bytes))
    groups = [
        group
        for split in demand.splits
        if split.ranks in machine.sizes
        for group in itertools.combinations(devices, split.ranks)
    ]
    for count in range(len(devices) + 1):
        for chosen in itertools.combinations(groups, count):
            used = [device for group in chosen for device in group]
            if len(set(used)) == len(used):
                yield chosen


def best_of_all(demands: Sequence[Demand], machine: Machine) -> float:
    """The least normalized latency that any plan is predicted to have."""
    return min(estimate(plan, demands, machine).normalized_latency for plan in all_plans(demands, machine))


def compare(cases: Sequence[Case], planners: dict[str, Planner]) -> dict[str, list[float]]:
    """Each planner's normalized latency over the least there is, one figure per case."""
    ratios: dict[str, list[float]] = {name: [] for name in planners}
    for demands, machine in cases:
        best = best_of_all(demands, machine)
        for name, planner in planners.items():
            found = estimate(planner(demands, machine), demands, machine).normalized_latency
            ratios[name].append(found / best)
    return ratios


def _print_ratios(cases: list[Case]) -> None:
    print("normalized latency over that of the best of all plans:")
    print(f"  {'':<10}{'median':>8}{'P95':>8}{'worst':>9}")
    for name, ratios in compare(cases, {"place": place, "alpa": alpa, "one_each": one_each}).items():
        p95 = sorted(ratios)[int(0.95 * (len(ratios) - 1))]
        print(f"  {name:<10}{statistics.median(ratios):>8.3f}{p95:>8.3f}{max(ratios):>9.3f}")


def _print_large(seed: int) -> None:
    print("large machines (normalized latency in ms per token):")
    print(f"  {'devices':>8}{'services':>9}{'req/s':>7}{'seconds':>9}{'place':>9}{'alpa':>9}{'one_each':>9}")
    for devices, services, load in _LARGE:
        demands, machine = draw(seed, devices, services, load)
        began = time.process_time()
        plan = place(demands, machine)
        seconds = time.process_time() - began
        plans = (plan, alpa(demands, machine), one_each(demands, machine))
        latencies = [estimate(p, demands, machine).normalized_latency * 1e3 for p in plans]
        shown = "".join(f"{latency:>9.1f}" for latency in latencies)
        print(f"  {devices:>8}{services:>9}{devices * load:>7.0f}{seconds:>9.2f}{shown}")


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="random cases against all plans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=3, help="at most, of a random case")
    parser.add_argument("--services", type=int, default=3, help="at most, of a random case")
    parser.add_argument("--no-large", action="store_true", help="leave out the large machines")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    cases = [
        draw(
            chance.randrange(1 << 30), chance.randint(1, options.devices), chance.randint(1, options.services)
        )
        for _ in range(options.cases)
    ]
    if cases:
        _print_ratios(cases)
    if not options.no_large:
        _print_large(options.seed)


if __name__ == "__main__":
    main()

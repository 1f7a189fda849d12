"""The latency that a plan would give, from rates and step costs alone.

Owns the queueing model behind planning. Must not search plans (`core.placement`), nor know a running node.

SeaLLM predicts normalized latency for its placement and leaves open how; what follows is reconstructed. On
a device every service with work steps in turn, so a request gets one token per *cycle*. With B_s the mean
number of requests of s in the system, T_s the mean time of one there, and steps linear in their rows:

    busy_s  = 1 - exp(-B_s)                      some request of s is there (Poisson occupancy)
    cycle_s = (sum_o busy_o fixed_o + B_o row_o, and s's own step for sure, with one row more) / (1 - prefill)
    T_s     = prefill_s / (1 - prefill) + output_s * cycle_s
    B_s     = rate_s * T_s                       (Little)

where `prefill` is the share of time that prompts take from everybody's decoding, and a replica on several
devices goes as the slowest of them lets it. The system is linear in the cycles but for `busy`: each device
is solved exactly for the others' values and the last `busy`, and that is repeated. (The plain iteration B ->
T -> B needs hundreds of rounds near saturation and cannot tell slow from divergent.)

Infeasible is what diverges, or needs more KV than the weights leave, or more rows than a step has. Such a
plan gets no infinity but what it would suffer: over a window the queue grows by the excess, and so does the
wait. A search that starts in the infeasible needs to know which way is better.

An *absent* service is served by swapping: it visits one group, shares its compute like a resident, and pays a
copy before each request (two, when a resident has to leave and come back for it), and waits on average for
half of the other visitors' turns. Requests that come while it is there pay too, and residents that have to
leave do not: one error makes absence look dearer, the other cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import NamedTuple

import msgspec

from seallmd.core.plan import Demand, Devices, Machine, Plan, Split, by_name, groups_of

_IDLE_RATE = 1e-4  # requests/s of a service that nobody calls: somebody will, so free room is worth giving
_WINDOW_SECONDS = 120.0  # for how long an overload is thought to last
NOWHERE_SECONDS = 3600.0  # latency of what no device can hold
_MOST_LOAD = 0.95  # share of the time that may be needed for work; queues explode just below 1
_ROUNDS = 60
_CLOSE = 1e-4  # relative change of the cycles at which they have settled


class Work(NamedTuple):
    """What one request of a service means on a group, precomputed.

    fixed, row: seconds of a step, and of each decode row in it. prefill: seconds of a prompt, without the
    fixed part. output: tokens. row_bytes: mean KV of a request on one rank. spare_bytes: the least KV.
    swap: seconds. weight: of its seconds in the objective, 1/s/tokens.
    """

    rate: float
    fixed: float
    row: float
    prefill: float
    output: float
    row_bytes: float
    weights_bytes: float
    spare_bytes: float
    swap: float
    weight: float

    @classmethod
    def of(cls, demand: Demand, split: Split, machine: Machine) -> Work:
        """The work of a demand at one number of ranks."""
        prompt, output = demand.prompt_tokens, demand.output()
        context = prompt + output / 2
        rate = max(_IDLE_RATE, demand.rate)
        return cls(
            rate=rate,
            fixed=split.fixed_seconds,
            row=split.token_seconds + context * split.context_seconds,
            prefill=prompt * (split.prompt_seconds + split.context_seconds),
            output=output,
            row_bytes=context * split.kv_bytes_per_token,
            weights_bytes=split.weights_bytes,
            spare_bytes=demand.least_bytes(split) - split.weights_bytes,
            swap=machine.swap(split),
            weight=demand.importance * rate / output,
        )

    def alone(self) -> float:
        """Seconds of a request that has the group to itself."""
        return self.prefill + self.output * (self.fixed + self.row)

    def load(self) -> float:
        """Share of the group's time that all requests take, batched as well as can be."""
        return self.rate * (self.prefill + self.output * self.row)


class Load(NamedTuple):
    """A replica, or an absent service's visits: its work, its share of the requests, where, and how."""

    work: Work
    share: float
    devices: Devices
    visiting: bool


class Outcome(NamedTuple):
    """Means for the requests of one `Load`.

    seconds: in the system, `swap` (copy and waiting for it) included. rows: requests in the system, those
    that wait for a swap aside. excess: by which share the tightest resource is overdrawn, 0 when none is;
    limit: "compute", "memory", "rows" or "" when none is.
    """

    seconds: float
    swap: float
    rows: float
    excess: float
    limit: str


def solve(loads: Sequence[Load], arenas: Sequence[float], max_rows: int) -> list[Outcome]:
    """What each load gets on devices 0 .. len(arenas) - 1 (arena bytes), in the order given."""
    on = [[load for load in enumerate(loads) if device in load[1].devices] for device in range(len(arenas))]
    cycles = _Cycles(loads, on)
    rows, seconds = cycles.rows, cycles.seconds
    drawn = [_drawn(here, rows, arena, max_rows) for here, arena in zip(on, arenas, strict=True)]
    found: list[Outcome] = []
    for i, load in enumerate(loads):
        over = {"compute": 0.0, "memory": 0.0, "rows": rows[i] / max_rows - 1}
        for device in load.devices:
            compute, memory = drawn[device]
            over["compute"], over["memory"] = max(over["compute"], compute), max(over["memory"], memory)
        # Too much work fills memory and steps as well: the first that lacks is the cause.
        limit = next((name for name, share in over.items() if share > 0), "")
        excess = max(0.0, *over.values())
        found.append(Outcome(seconds[i] + excess * _WINDOW_SECONDS / 2, 0.0, rows[i], excess, limit))
    if any(load.visiting for load in loads):
        _swap(loads, found, on, arenas)
    return found


_On = list[tuple[int, Load]]  # the loads of one device, with their indices


class _Line(NamedTuple):
    """A load on the device that binds it, as a linear function of the device's cycle K and its own `busy`.

    seconds = base + output / left * K - idle * busy. To the numerator of the cycle it adds still + busy *
    stepping, to the denominator it takes away `growth`.
    """

    base: float
    slope: float
    idle: float
    still: float
    stepping: float
    growth: float

    @classmethod
    def of(cls, load: Load, left: float) -> _Line:
        """left: share of the device's time that prompts leave."""
        work = load.work
        base = work.prefill + work.output * (work.fixed + work.row)
        saved = work.output * work.fixed  # its own step is counted for sure: not once more as the others'
        rows = work.rate * load.share * work.row
        return cls(
            base=base / left,
            slope=work.output / left,
            idle=saved / left,
            still=rows * base,
            stepping=work.fixed * left - rows * saved,
            growth=rows * work.output,
        )


class _Cycles:
    """The fixed point of the loads on some devices, iterated in place. rows, seconds: means of each load."""

    def __init__(self, loads: Sequence[Load], on: list[_On]) -> None:
        self._loads, self._on = loads, on
        self._left = [
            max(1 - _MOST_LOAD, 1 - sum(x.work.rate * x.share * x.work.prefill for _, x in here))
            for here in on
        ]
        self._arriving = [load.work.rate * load.share for load in loads]
        self._bound = [load.devices[0] for load in loads]
        self._busy, self._shared = [0.0] * len(loads), [0.0] * len(on)
        self.rows, self.seconds = [0.0] * len(loads), [0.0] * len(loads)
        for _ in range(_ROUNDS):
            self._settle()
            if not self._rebind():
                break

    def _settle(self) -> None:
        """The fixed point, each load bound by the device that it is."""
        lines = [_Line.of(x, self._left[d]) for x, d in zip(self._loads, self._bound, strict=True)]
        grown = [
            sum(lines[i].growth for i, _ in here if self._bound[i] == d) for d, here in enumerate(self._on)
        ]
        denominators = [max(1 - _MOST_LOAD, left - g) for left, g in zip(self._left, grown, strict=True)]
        for _ in range(_ROUNDS):
            moved = 0.0
            for device, denominator in enumerate(denominators):
                cycle = self._numerator(device, lines) / denominator
                moved = max(moved, abs(cycle - self._shared[device]) - _CLOSE * cycle)
                self._shared[device] = cycle
            for i, line in enumerate(lines):
                seconds = line.base + line.slope * self._shared[self._bound[i]] - line.idle * self._busy[i]
                rows = self._arriving[i] * seconds
                self.seconds[i], self.rows[i], self._busy[i] = seconds, rows, 1 - exp(-rows)
            if moved <= 0:
                return

    def _numerator(self, device: int, lines: list[_Line]) -> float:
        found = 0.0
        for i, load in self._on[device]:
            if self._bound[i] == device:
                found += lines[i].still + self._busy[i] * lines[i].stepping
            else:
                stepping = self._busy[i] * load.work.fixed + self.rows[i] * load.work.row
                found += self._left[device] * stepping
        return found

    def _rebind(self) -> bool:
        """Bind each load by the slowest of its devices. Whether that changed anything."""
        changed = False
        for i, load in enumerate(self._loads):
            if len(load.devices) > 1:
                own = load.work.fixed * (1 - self._busy[i]) + load.work.row
                slowest = max(load.devices, key=lambda d: (self._shared[d] + own) / self._left[d])
                changed |= slowest != self._bound[i]
                self._bound[i] = slowest
        return changed


def _drawn(here: _On, rows: list[float], arena: float, max_rows: int) -> tuple[float, float]:
    """By which shares a device's compute and its memory are overdrawn; below 0 when they are not."""
    load = sum(x.work.load() * x.share for _, x in here) / _MOST_LOAD - 1
    free = arena - sum(x.work.weights_bytes for _, x in here if not x.visiting)
    kv = sum(min(rows[i], max_rows) * x.work.row_bytes for i, x in here)
    memory = kv / free - 1 if free > 0 else 1 - free / max(arena, 1)  # a lost device has no memory at all
    return load, memory


def _swap(loads: Sequence[Load], found: list[Outcome], on: list[_On], arenas: Sequence[float]) -> None:
    """Add to visitors' outcomes the copies and the waiting for their turn."""
    room = []
    for here, arena in zip(on, arenas, strict=True):
        taken = sum(x.work.weights_bytes for _, x in here if not x.visiting)
        kv = sum(found[i].rows * x.work.row_bytes for i, x in here if not x.visiting)
        room.append(arena - taken - kv)
    copies, turns, queue = {}, {}, [0.0] * len(on)
    for i, load in enumerate(loads):
        if load.visiting:
            need = load.work.weights_bytes + load.work.spare_bytes
            fits = all(need <= room[device] for device in load.devices)
            copies[i] = load.work.swap * (1 if fits else 2)
            holds = found[i].seconds + copies[i]
            wanted = load.work.rate * load.share * holds
            turns[i] = holds * wanted / (1 + wanted)
            for device in load.devices:
                queue[device] += turns[i]
    for i, copy in copies.items():
        swap = copy + max(queue[device] - turns[i] for device in loads[i].devices) / 2
        found[i] = found[i]._replace(seconds=found[i].seconds + swap, swap=swap)


# ------------------------------------------------------------------------------------- a whole plan


class ServiceEstimate(msgspec.Struct, frozen=True):
    """What a plan is predicted to give one service.

    seconds: mean latency of a request. seconds_per_token: that over its output (normalized latency, as Orca
    and vLLM use the word). slowdown: seconds over those of a request alone on its fastest split.
    swap_seconds: the part that is waiting to be swapped in, 0 for residents. rows: requests in the system.
    limit: what it lacks: "compute", "memory", "rows", "nowhere" (no group can hold it); "" when nothing.
    """

    seconds: float
    seconds_per_token: float
    slowdown: float
    swap_seconds: float
    rows: float
    limit: str


class Estimate(msgspec.Struct, frozen=True):
    """What a plan is predicted to give. normalized_latency: seconds per token, weighted by rates
    and importance."""

    services: dict[str, ServiceEstimate]
    normalized_latency: float

    @property
    def feasible(self) -> bool:
        """Whether no service lacks anything."""
        return not any(service.limit for service in self.services.values())


class _Part(NamedTuple):
    """A load on the machine's own device numbers, and whose it is."""

    service: str
    load: Load


def estimate(plan: Plan, demands: Sequence[Demand], machine: Machine) -> Estimate:
    """What the plan would give. A service's requests are spread evenly over its replicas.

    Raises ValueError for a replica that the demands give no split for.
    """
    known = by_name(demands)
    parts = [
        _Part(name, _resident(known[name], group, len(plan.of(name)), machine))
        for name, group in plan.placed()
        if name in known
    ]
    absent = [demand for demand in demands if not plan.of(demand.name)]
    costs: dict[tuple[int, ...], float] = {}
    for demand in sorted(absent, key=lambda d: -d.importance * d.rate):
        if visit := _best_visit(demand, parts, machine, costs):
            parts.append(visit)
    outcomes: dict[str, list[Outcome]] = {demand.name: [] for demand in demands}
    for part, outcome in zip(parts, _outcomes(parts, machine), strict=True):
        outcomes[part.service].append(outcome)
    services = {name: _of_service(known[name], found, machine) for name, found in outcomes.items()}
    weights = {demand.name: demand.importance * max(_IDLE_RATE, demand.rate) for demand in demands}
    total = sum(weights[name] * service.seconds_per_token for name, service in services.items())
    return Estimate(services, total / (sum(weights.values()) or 1.0))


def _resident(demand: Demand, group: Devices, replicas: int, machine: Machine) -> Load:
    split = demand.split(len(group))
    if split is None:
        raise ValueError(f"{demand.name} cannot run on {len(group)} devices")
    return Load(Work.of(demand, split, machine), 1 / replicas, group, visiting=False)


def _best_visit(
    demand: Demand, parts: list[_Part], machine: Machine, costs: dict[tuple[int, ...], float]
) -> _Part | None:
    """The visits of an absent service where they harm least; None when nothing can hold it.

    costs: of sets of parts (by index), remembered from one absent service to the next.
    """
    split = _fewest_ranks(demand, machine)
    work = Work.of(demand, split, machine)
    best, harm = None, float("inf")
    known: tuple[tuple[int, ...], float] = (), 0.0
    empty: set[tuple[int, ...]] = set()  # arenas of the groups without neighbours: one of a kind is enough
    for group in groups_of(machine, split.ranks):
        arenas = tuple(machine.arena_bytes[device] for device in group)
        near = _near(parts, group)
        if demand.least_bytes(split) > min(arenas) or (not near and arenas in empty):
            continue
        if not near:
            empty.add(arenas)
        if near not in costs:
            costs[near] = _cost([parts[i] for i in near], machine)
        visit = _Part(demand.name, Load(work, 1.0, group, visiting=True))
        with_it = _cost([*(parts[i] for i in near), visit], machine)
        if with_it - costs[near] < harm:
            best, harm = visit, with_it - costs[near]
            known = (*near, len(parts)), with_it
    costs[known[0]] = known[1]
    return best


def _fewest_ranks(demand: Demand, machine: Machine) -> Split:
    """On how many devices demand brings it in: as few as hold it."""
    for split in demand.splits:
        need = demand.least_bytes(split)
        groups = groups_of(machine, split.ranks)
        if any(need <= min(machine.arena_bytes[device] for device in group) for group in groups):
            return split
    return demand.splits[0]


def _near(parts: list[_Part], group: Devices) -> tuple[int, ...]:
    """All parts, by index, that share a device with the group, with what shares one with that, and so on."""
    reach = set(group)
    found: tuple[int, ...] = ()
    while True:
        near = tuple(i for i, part in enumerate(parts) if not reach.isdisjoint(part.load.devices))
        if near == found:
            return near
        found = near
        reach.update(device for i in near for device in parts[i].load.devices)


def _outcomes(parts: list[_Part], machine: Machine) -> list[Outcome]:
    """The loads solved together, on those devices alone that they use."""
    used = sorted({device for part in parts for device in part.load.devices})
    local = {device: i for i, device in enumerate(used)}
    loads = [p.load._replace(devices=tuple(local[device] for device in p.load.devices)) for p in parts]
    return solve(loads, [machine.arena_bytes[device] for device in used], machine.max_rows)


def _cost(parts: list[_Part], machine: Machine) -> float:
    """The parts' share of the objective."""
    outcomes = _outcomes(parts, machine)
    return sum(p.load.work.weight * p.load.share * o.seconds for p, o in zip(parts, outcomes, strict=True))


def _of_service(demand: Demand, outcomes: list[Outcome], machine: Machine) -> ServiceEstimate:
    alone = min(Work.of(demand, split, machine).alone() for split in demand.splits)
    if not outcomes:
        per_token = NOWHERE_SECONDS / demand.output()
        return ServiceEstimate(NOWHERE_SECONDS, per_token, NOWHERE_SECONDS / alone, 0.0, 0.0, "nowhere")
    seconds = sum(o.seconds for o in outcomes) / len(outcomes)
    worst = max(outcomes, key=lambda o: o.excess)
    return ServiceEstimate(
        seconds=seconds,
        seconds_per_token=seconds / demand.output(),
        slowdown=seconds / alone,
        swap_seconds=sum(o.swap for o in outcomes) / len(outcomes),
        rows=sum(o.rows for o in outcomes),
        limit=worst.limit,
    )

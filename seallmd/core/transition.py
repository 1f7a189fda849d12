"""From one plan to another, one reversible step at a time.

Owns the order of the steps: weights fit at every moment, and no service is left without a replica while there
is a way around it. Must not know why the plan changes, nor how a step is carried out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import msgspec

from seallmd.core.plan import Demand, Devices, Machine, Plan, broken, by_name, groups_of, meet


class Bring(msgspec.Struct, frozen=True, tag=True):
    """Make a replica of the service resident on these devices."""

    service: str
    devices: Devices


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Let the service's replica on these devices go, once its requests have moved on or ended."""

    service: str
    devices: Devices


Change = Bring | Drop
_Replica = tuple[str, Devices]
_State = frozenset[_Replica]  # the replicas that there are at one moment

_MOST_STATES = 4000  # that are looked at for an order without a dark service


def apply(plan: Plan, step: Change) -> Plan:
    """The plan after one step. Raises ValueError for a step that cannot be made."""
    groups = plan.of(step.service)
    if isinstance(step, Drop):
        if step.devices not in groups:
            raise ValueError(f"{step.service} is not on {step.devices}")
        left = tuple(group for group in groups if group != step.devices)
    else:
        if not _clear(plan, step.service, step.devices):
            raise ValueError(f"{step.service} is already on one of {step.devices}")
        left = (*groups, step.devices)
    return Plan({**plan.replicas, step.service: left})


def steps(current: Plan, target: Plan, demands: Sequence[Demand], machine: Machine) -> list[Change]:
    """The steps from one plan to another, in order.

    If a short search finds an order in which no service of both plans is ever without a replica, it is that
    one; a service may be put on further devices for the time being. Else what fits comes in first, and when
    nothing does, the least missed replica leaves. The demands cover both plans. Raises ValueError when they
    do not, or when the target cannot exist.
    """
    known = by_name(demands)
    if strange := {service for plan in (current, target) for service, _ in plan.placed()} - known.keys():
        raise ValueError(f"the demands lack {', '.join(sorted(strange))}")
    if reason := broken(target, demands, machine):
        raise ValueError(f"the plan cannot be reached: {reason}")
    lit = _Lit(current, target, demands, machine).steps()
    return _Mover(current, target, demands, machine).steps() if lit is None else lit


def _clear(plan: Plan, service: str, devices: Devices) -> bool:
    """Whether the service is on none of the devices."""
    return all(set(devices).isdisjoint(group) for group in plan.of(service))


class _Lit:
    """The search for an order in which no service goes dark: A*, guided by the steps still needed."""

    def __init__(self, current: Plan, target: Plan, demands: Sequence[Demand], machine: Machine) -> None:
        self._start, self._goal = frozenset(current.placed()), frozenset(target.placed())
        self._kept = {service for service, _ in self._start} & {service for service, _ in self._goal}
        self._demands, self._machine = by_name(demands), machine
        self._order = sorted(self._demands, key=lambda name: (-self._demands[name].rate, name))

    def steps(self) -> list[Change] | None:
        """The fewest steps, or None when there is no such order or it was not found."""
        queue: list[tuple[int, int, int, _State, tuple[Change, ...]]] = [(0, 0, 0, self._start, ())]
        seen = {self._start}
        while queue and len(seen) < _MOST_STATES:
            *_, state, path = heapq.heappop(queue)
            if state == self._goal:
                return list(path)
            for step in self._next(state):
                after = state ^ {(step.service, step.devices)}
                if after not in seen:
                    seen.add(after)
                    done = len(path) + 1  # of equally promising ones the furthest goes on: ties are many
                    needed = done + len(after ^ self._goal)
                    heapq.heappush(queue, (needed, -done, len(seen), after, (*path, step)))
        return None

    def _next(self, state: _State) -> Iterator[Change]:
        """What can be done without making a service dark: first what has to be done anyway."""
        taken: dict[str, list[Devices]] = {name: [] for name in self._order}
        for service, group in sorted(state):
            taken[service].append(group)
        wanted = [
            (name, group) for name in self._order for n, group in sorted(self._goal - state) if n == name
        ]
        room = self._room(state)
        brings = (replica for replica in wanted if self._fits(*replica, taken, room))
        yield from (Bring(*replica) for replica in brings)
        leaving = sorted(state - self._goal, key=lambda r: (self._demands[r[0]].rate, r))
        for service, group in leaving:
            if len(taken[service]) > 1 or service not in self._kept:
                yield Drop(service, group)
        for service, _ in leaving:
            if len(taken[service]) == 1 and service in self._kept:
                for split in self._demands[service].splits:
                    for group in groups_of(self._machine, split.ranks):
                        if self._fits(service, group, taken, room):
                            yield Bring(service, group)

    def _room(self, state: _State) -> list[tuple[float, float]]:
        """Of every device, the bytes without weights, and the least KV that has to be left of them."""
        room = [(float(arena), 0.0) for arena in self._machine.arena_bytes]
        for service, group in state:
            weights, least = self._bytes(service, group)
            for device in group:
                free, spare = room[device]
                room[device] = free - weights, max(spare, least)
        return room

    def _bytes(self, service: str, group: Devices) -> tuple[float, float]:
        """Weights and least KV of one rank."""
        split = self._demands[service].split(len(group))
        if split is None:
            raise ValueError(f"{service} cannot run on {len(group)} devices")
        return split.weights_bytes, self._demands[service].least_bytes(split) - split.weights_bytes

    def _fits(
        self,
        service: str,
        group: Devices,
        taken: dict[str, list[Devices]],
        room: list[tuple[float, float]],
    ) -> bool:
        if meet((group,), taken[service]):
            return False
        if any(one == service and meet((group,), taken.get(other, ())) for one, other in self._machine.apart):
            return False
        weights, least = self._bytes(service, group)
        return all(room[device][0] - weights >= max(room[device][1], least) for device in group)


class _Mover:
    """A plan on its way to another, without looking ahead."""

    def __init__(self, current: Plan, target: Plan, demands: Sequence[Demand], machine: Machine) -> None:
        self._plan, self._target = current, target
        self._demands, self._machine = demands, machine
        self._rates = {demand.name: demand.rate for demand in demands}
        self._done: list[Change] = []

    def steps(self) -> list[Change]:
        """Step until the target is reached."""
        while brings := list(self._missing(self._plan, self._target)):
            bring = self._best(brings, self._fits)
            if bring is not None:
                self._step(Bring(*bring))
            else:
                self._step(Drop(*self._victim(brings)))
        for replica in list(self._missing(self._target, self._plan)):
            self._step(Drop(*replica))
        return self._done

    def _step(self, step: Change) -> None:
        self._plan = apply(self._plan, step)
        self._done.append(step)

    @staticmethod
    def _missing(here: Plan, there: Plan) -> Iterator[_Replica]:
        """Replicas that are in one plan and not in the other."""
        return (replica for replica in there.placed() if replica[1] not in here.of(replica[0]))

    def _best(self, replicas: list[_Replica], fits: Callable[[_Replica], bool]) -> _Replica | None:
        """Of those that fit, one of a service that has none comes first, then the most wanted."""
        ready = [replica for replica in replicas if fits(replica)]
        return min(ready, key=lambda r: (bool(self._plan.of(r[0])), -self._rates[r[0]], r), default=None)

    def _fits(self, replica: _Replica) -> bool:
        service, devices = replica
        if not _clear(self._plan, service, devices):
            return False
        return not broken(apply(self._plan, Bring(service, devices)), self._demands, self._machine)

    def _dark(self, replica: _Replica) -> bool:
        """Whether dropping it leaves a service without a replica that is to have one."""
        return len(self._plan.of(replica[0])) == 1 and bool(self._target.of(replica[0]))

    def _victim(self, brings: list[_Replica]) -> _Replica:
        """The next replica to leave: the least missed, and of these one that is in the way of most."""
        return min(
            self._missing(self._target, self._plan),
            key=lambda r: (
                self._dark(r),
                self._rates[r[0]] if self._dark(r) else 0.0,
                -self._in_way(r, brings),
                r,
            ),
        )

    def _in_way(self, replica: _Replica, brings: list[_Replica]) -> int:
        """How many devices of replicas to come it holds."""
        return sum(len(set(devices).intersection(replica[1])) for _, devices in brings)

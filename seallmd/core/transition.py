"""From one plan to another, one reversible step at a time.

Owns the order of the steps: weights fit at every moment, and no service is left without a replica while there
is a way around it. Must not know why the plan changes, nor how a step is carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from seallmd.core.plan import Demand, Devices, Machine, Plan, broken, by_name, groups_of


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


def undo(step: Change) -> Change:
    """The step that takes this one back."""
    kind = Bring if isinstance(step, Drop) else Drop
    return kind(step.service, step.devices)


def steps(current: Plan, target: Plan, demands: Sequence[Demand], machine: Machine) -> list[Change]:
    """The steps from one plan to another, in order.

    What fits comes in first. When nothing does, a replica leaves: first one whose service has another, or is
    to be absent; else, a service that would be left with none is first put on devices that have room for it,
    for as long as it takes; only when there are none, it is dropped and comes back later. A service with a
    higher rate is served first, and dropped last. The demands cover both plans. Raises ValueError when they
    do not, or when the target cannot exist.
    """
    known = by_name(demands)
    if strange := {service for plan in (current, target) for service, _ in plan.placed()} - known.keys():
        raise ValueError(f"the demands lack {', '.join(sorted(strange))}")
    if reason := broken(target, demands, machine):
        raise ValueError(f"the plan cannot be reached: {reason}")
    return _Mover(current, target, demands, machine).steps()


def dark_services(current: Plan, target: Plan, order: Iterable[Change]) -> set[str]:
    """The services that are in both plans and without any replica after some of the steps."""
    dark, plan = set(), current
    for step in order:
        plan = apply(plan, step)
        if not plan.of(step.service) and target.of(step.service):
            dark.add(step.service)
    return dark


def _clear(plan: Plan, service: str, devices: Devices) -> bool:
    """Whether the service is on none of the devices."""
    return all(set(devices).isdisjoint(group) for group in plan.of(service))


class _Mover:
    """A plan on its way to another."""

    def __init__(self, current: Plan, target: Plan, demands: Sequence[Demand], machine: Machine) -> None:
        self._plan, self._target = current, target
        self._demands, self._machine = demands, machine
        self._rates = {demand.name: demand.rate for demand in demands}
        self._done: list[Change] = []
        self._put_up: set[str] = set()  # services that were given a place for the time being

    def steps(self) -> list[Change]:
        """Step until the target is reached."""
        while brings := list(self._missing(self._plan, self._target)):
            bring = self._best(brings, self._fits)
            if bring is not None:
                self._step(Bring(*bring))
            elif not self._put_up_one():
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

    def _put_up_one(self) -> bool:
        """When whatever leaves would leave a service with nothing: give one a place for the time being."""
        leaving = list(self._missing(self._target, self._plan))
        if not all(self._dark(replica) for replica in leaving):
            return False
        for service in sorted({r[0] for r in leaving} - self._put_up, key=lambda s: (self._rates[s], s)):
            places = (
                (service, group)
                for split in by_name(self._demands)[service].splits
                for group in groups_of(self._machine, split.ranks)
            )
            if place := self._best(list(places), self._fits):
                self._put_up.add(service)
                self._step(Bring(*place))
                return True
        return False

"""When a better plan is worth moving to, and how often to look for one.

Owns SeaLLM's adaptive replacement, reconstructed as ski rental: as long as the plan in force is not the best
known, regret grows by the request-seconds that it loses; once regret has reached what the move would cost,
the move is made. For one decision that costs at most twice what hindsight would pay, whatever the rates do,
plus the regret of one tick. Must not search (`core.placement`) or move anything: `tick` names the steps.

The two slow parts are apart, so that the search may run elsewhere: `wants_plan` says when, `planned` takes
its result. All of it goes by the `now` it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seallmd.core.latency import Estimate, ServiceEstimate, estimate
from seallmd.core.plan import Demand, Devices, Machine, Plan, broken, by_name
from seallmd.core.settings import ReplacementSettings
from seallmd.core.status import PlanStatus, ServicePlan
from seallmd.core.transition import Bring, Change, steps

_NOISE_RATE = 0.02  # requests/s that are added to both sides when rates are compared


class Replacement:
    """Regret, and the clock of planning."""

    def __init__(self, machine: Machine, settings: ReplacementSettings | None = None) -> None:
        self.regret = 0.0
        self._machine = machine
        self._settings = settings or ReplacementSettings()
        self._interval = self._settings.min_interval_seconds
        self._planned_at: float | None = None
        self._planned_rates: dict[str, float] = {}
        self._best: Plan | None = None
        self._ticked_at: float | None = None

    def best(self, current: Plan) -> Plan:
        """The best plan known; `current` while there is no better one."""
        return self._best or current

    # ----------------------------------------------------------------------------- when to plan

    def wants_plan(self, now: float, demands: Sequence[Demand]) -> bool:
        """Whether `place` is to be asked now."""
        return now >= self._next_planning(demands)

    def planned(self, now: float, demands: Sequence[Demand], current: Plan, best: Plan) -> None:
        """`place` gave this plan for these demands."""
        gives, has = (estimate(plan, demands, self._machine) for plan in (best, current))
        limit = has.normalized_latency * (1 - self._settings.least_gain)
        better = best if gives.normalized_latency <= limit and not best.same(current) else None
        if self._drifted(demands):
            self._interval = self._settings.min_interval_seconds
        elif self._planned_at is not None and (
            better is None or (self._best is not None and better.same(self._best))
        ):
            self._interval = min(2 * self._interval, self._settings.max_interval_seconds)
        self._best = better
        self._planned_at = now
        self._planned_rates = {demand.name: demand.rate for demand in demands}

    def _next_planning(self, demands: Sequence[Demand]) -> float:
        if self._planned_at is None:
            return float("-inf")
        soon = self._drifted(demands)
        return self._planned_at + (self._settings.min_interval_seconds if soon else self._interval)

    def _drifted(self, demands: Sequence[Demand]) -> bool:
        """Whether a rate is no longer what was planned for, or a service is new or gone."""
        planned = self._planned_rates
        if self._planned_at is None or not self._planned_for(demands):
            return self._planned_at is not None
        pairs = (sorted((planned[demand.name], demand.rate)) for demand in demands)
        return any(high + _NOISE_RATE > self._settings.drift * (low + _NOISE_RATE) for low, high in pairs)

    def _planned_for(self, demands: Sequence[Demand]) -> bool:
        """Whether the last planning was for just these services."""
        return self._planned_rates.keys() == {demand.name for demand in demands}

    # ----------------------------------------------------------------------------- when to move

    def tick(
        self, now: float, demands: Sequence[Demand], current: Plan, inflight: Mapping[str, int]
    ) -> list[Change]:
        """Count regret since the last tick; the steps to the best plan once they pay, else none.

        inflight: requests running, by service. Steps that were given out are expected to be made, or given
        up: call again when that is so, the time between does not count. While the services are not those that
        were planned for, nothing is counted. Raises ValueError when `demands` lack a service of `current`.
        """
        elapsed = 0.0 if self._ticked_at is None else max(0.0, now - self._ticked_at)
        self._ticked_at = now
        if self._best is None or not self._planned_for(demands) or self._best.same(current):
            return []
        if broken(self._best, demands, self._machine):  # ranks or places were changed since
            self._best = None
            return []
        self.regret += elapsed * regret_rate(current, self._best, demands, self._machine)
        cost = moving_cost(current, self._best, demands, self._machine, inflight)
        if not self.regret or self.regret < cost:
            return []
        order = steps(current, self._best, demands, self._machine)
        self.regret = 0.0
        self._interval = self._settings.min_interval_seconds
        self._ticked_at = None
        return order

    def holds(self, demands: Sequence[Demand], current: Plan) -> bool:
        """Whether to go on with a move that is half made: where it leads is still no worse than `current`."""
        if self._best is None or not self._planned_for(demands) or broken(self._best, demands, self._machine):
            return False
        gives, has = (estimate(plan, demands, self._machine) for plan in (self._best, current))
        return has.normalized_latency > gives.normalized_latency * (1 - self._settings.least_gain)

    def status(
        self, now: float, demands: Sequence[Demand], current: Plan, inflight: Mapping[str, int]
    ) -> PlanStatus:
        """What `tick` goes by, for people. Changes nothing."""
        best = self._best if self._best is not None and self._planned_for(demands) else current
        if best is not current and broken(best, demands, self._machine):
            best = current  # ranks or places were changed since
        gives, has = (estimate(plan, demands, self._machine) for plan in (best, current))
        return PlanStatus(
            current=current,
            best=best,
            regret=self.regret,
            cost=moving_cost(current, best, demands, self._machine, inflight),
            next_planning_seconds=max(0.0, self._next_planning(demands) - now),
            current_normalized_latency=has.normalized_latency,
            best_normalized_latency=gives.normalized_latency,
            services=tuple(_service_plan(demand, current, best, has, gives) for demand in demands),
            steps=() if best is current else moves(current, best, demands, self._machine),
        )


def regret_rate(current: Plan, best: Plan, demands: Sequence[Demand], machine: Machine) -> float:
    """Request-seconds lost per second: rate * (normalized latency now - at best) * output * importance, over
    services.

    Never negative: plans are chosen by seconds per token, and one that is better by those may be worse by
    request-seconds; that is no reason to pay back.
    """
    now, then = (estimate(plan, demands, machine).services for plan in (current, best))
    lost = sum(d.importance * d.rate * (now[d.name].seconds - then[d.name].seconds) for d in demands)
    return max(0.0, lost)


def moving_cost(
    current: Plan, best: Plan, demands: Sequence[Demand], machine: Machine, inflight: Mapping[str, int]
) -> float:
    """Request-seconds lost by moving: blackout * (arrivals in it + requests in flight), over services.

    A device that anything is brought to or dropped from is taken to be blacked out for as long as its copies
    take, and with it the share of each service's replicas that touches it. An upper bound: copies run beside
    the steps of those who stay.
    """
    known = by_name(demands)
    moves = set(current.placed()) ^ set(best.placed())
    blackout = {device: machine.swap_seconds for _, group in moves for device in group}
    for service, group in set(best.placed()) - set(current.placed()):
        split = known[service].split(len(group)) if service in known else None
        if split is None:
            raise ValueError(f"{service} cannot be on {len(group)} devices by these demands")
        for device in group:
            blackout[device] += split.weights_bytes / machine.copy_bytes_per_second
    lost = 0.0
    for demand in demands:
        groups = current.of(demand.name) or best.of(demand.name)
        for group in groups:
            seconds = max((blackout.get(device, 0.0) for device in group), default=0.0)
            there = (demand.rate * seconds + inflight.get(demand.name, 0)) / len(groups)
            lost += demand.importance * seconds * there
    return lost


# ------------------------------------------------------------------------------------------ in words


def moves(current: Plan, best: Plan, demands: Sequence[Demand], machine: Machine) -> tuple[str, ...]:
    """The steps between two plans as lines for people."""
    return tuple(
        f"{'bring' if isinstance(step, Bring) else 'drop'} {step.service} {_where((step.devices,))}"
        for step in steps(current, best, demands, machine)
    )


def _service_plan(demand: Demand, current: Plan, best: Plan, has: Estimate, gives: Estimate) -> ServicePlan:
    here, there = current.of(demand.name), best.of(demand.name)
    now, then = has.services[demand.name], gives.services[demand.name]
    reason = _reason(demand, here, there, now, then)
    return ServicePlan(demand.name, here, there, now.seconds_per_token, then.seconds_per_token, reason)


def _reason(
    demand: Demand,
    here: tuple[Devices, ...],
    there: tuple[Devices, ...],
    now: ServiceEstimate,
    then: ServiceEstimate,
) -> str:
    """Why a service is, or should be, where it is."""
    if then.limit == "nowhere":
        return "no group of devices can hold it"
    words = [_where(there)]
    if demand.placed is not None:
        words.append("placed by the operator" if demand.placed else "not asked for")
    if set(here) != set(there):
        words.append(f"now {_where(here)}")
        words.append(f"{now.seconds_per_token * 1e3:.3g} -> {then.seconds_per_token * 1e3:.3g} ms per token")
    else:
        words.append(f"{then.seconds_per_token * 1e3:.3g} ms per token")
    if not there and demand.placed is None:
        words.append("the others make better use of the memory")
    if not there:
        words.append(f"a request waits {then.swap_seconds:.2g} s to be swapped in")
    if then.limit:
        words.append(f"short of {then.limit}")
    return ", ".join(words)


def _where(groups: tuple[Devices, ...]) -> str:
    """Groups in words: "on device 0", "on devices 0+1 and 2"."""
    if not groups:
        return "absent"
    several = len(groups) > 1 or len(groups[0]) > 1
    return f"on device{'s' if several else ''} " + " and ".join("+".join(map(str, group)) for group in groups)

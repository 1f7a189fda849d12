"""Replacement: when to move to a better plan, and in which steps."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec
import pytest

from seallmd.core.latency import estimate
from seallmd.core.plan import Demand, Machine, Plan, Split, broken
from seallmd.core.replacement import Replacement, moves, moving_cost, regret_rate
from seallmd.core.settings import ReplacementSettings
from seallmd.core.transition import Bring, Change, Drop, apply, steps
from tools.bench_placement import all_plans, draw

GIB = 1 << 30
MACHINE = Machine((80 * GIB,) * 2, copy_bytes_per_second=20 * GIB, swap_seconds=1.0)
# Whoever is called most wants a device of its own.
A_ALONE = Plan({"a": ((0,),), "b": ((1,),), "c": ((1,),)})
B_ALONE = Plan({"a": ((1,),), "b": ((0,),), "c": ((1,),)})


def undo(step: Change) -> Change:
    """The step that takes this one back."""
    kind = Bring if isinstance(step, Drop) else Drop
    return kind(step.service, step.devices)


def dark_services(current: Plan, target: Plan, order: Iterable[Change]) -> set[str]:
    """The services that are in both plans and without any replica after some of the steps."""
    dark, plan = set(), current
    for step in order:
        plan = apply(plan, step)
        if not plan.of(step.service) and target.of(step.service):
            dark.add(step.service)
    return dark


def demand(name: str, rate: float, gib: int = 20) -> Demand:
    """A model for one or two devices."""
    splits = tuple(
        Split(r, gib * GIB // r, 1e5 / r, 0.01 / r**0.8, 1e-4 / r, 1e-8 / r, 1e-4 / r) for r in (1, 2)
    )
    return Demand(name, rate, 100, 200, splits)


def three(a: float, b: float, c: float = 0.5) -> list[Demand]:
    """The services of the two plans, with these rates."""
    return [demand("a", a), demand("b", b), demand("c", c)]


# -------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("seed", range(25))
def test_steps_fit_at_every_moment_and_end_at_the_target(seed: int) -> None:
    """Protects the arenas during a move: a step that does not fit would be refused half way."""
    demands, machine = draw(seed, 3, 3)
    chance = random.Random(seed)
    plans = list(all_plans(demands, machine))
    for _ in range(10):
        plan, target = chance.choice(plans), chance.choice(plans)
        for step in steps(plan, target, demands, machine):
            after = apply(plan, step)
            assert broken(after, demands, machine) == ""
            assert apply(after, undo(step)).same(plan)
            plan = after
        assert plan.same(target)


def test_nothing_is_done_for_equal_plans() -> None:
    """Protects from moves for nothing."""
    assert steps(A_ALONE, A_ALONE, three(1, 1), MACHINE) == []


def test_a_replica_arrives_before_the_other_leaves() -> None:
    """Protects service during a move: where both fit, there is always one."""
    order = steps(A_ALONE, B_ALONE, three(1, 1), MACHINE)
    assert dark_services(A_ALONE, B_ALONE, order) == set()
    assert len(order) == 4


def test_two_services_change_places_over_a_third_device() -> None:
    """Protects service when two devices are full: a free one is lent for the time of the move."""
    demands = [demand("a", 2, gib=70), demand("b", 1, gib=70)]
    current, target = Plan({"a": ((0,),), "b": ((1,),)}), Plan({"a": ((1,),), "b": ((0,),)})
    order = steps(current, target, demands, Machine((80 * GIB,) * 3, 20 * GIB))
    assert dark_services(current, target, order) == set()
    assert order[0] == Bring("b", (2,))
    assert order[-1] == Drop("b", (2,))


def test_without_a_third_the_service_with_fewer_requests_goes_dark() -> None:
    """Protects the busier service when one of two has to go without for a while."""
    demands = [demand("a", 2, gib=70), demand("b", 1, gib=70)]
    current, target = Plan({"a": ((0,),), "b": ((1,),)}), Plan({"a": ((1,),), "b": ((0,),)})
    order = steps(current, target, demands, MACHINE)
    assert dark_services(current, target, order) == {"b"}


def test_what_cannot_be_is_refused() -> None:
    """Protects the ledger from plans that were made for another machine."""
    with pytest.raises(ValueError, match="bytes"):
        steps(A_ALONE, B_ALONE, three(1, 1), Machine((30 * GIB,) * 2, 20 * GIB))
    with pytest.raises(ValueError, match="lack c"):
        steps(A_ALONE, B_ALONE, three(1, 1)[:2], MACHINE)
    with pytest.raises(ValueError, match="already"):
        apply(A_ALONE, Bring("a", (0, 1)))
    with pytest.raises(ValueError, match="not on"):
        apply(A_ALONE, Drop("a", (1,)))


# ------------------------------------------------------------------------------------------- regret


@pytest.mark.parametrize("seed", range(10))
def test_regret_and_cost_are_never_negative(seed: int) -> None:
    """Protects the account: a plan that is worse by request-seconds must not pay back what others lost."""
    chance = random.Random(seed)
    demands, machine = draw(seed, 2, 3)
    plans = list(all_plans(demands, machine))
    for _ in range(20):
        current, best = chance.choice(plans), chance.choice(plans)
        assert regret_rate(current, best, demands, machine) >= 0
        assert moving_cost(current, best, demands, machine, {}) >= 0
        assert moving_cost(best, best, demands, machine, {"service-0": 9}) == 0


def test_the_cost_is_blackout_times_who_is_there() -> None:
    """Protects the formula's units: request-seconds, each replica for its share of the requests."""
    only_c = Plan({"a": ((0,),), "b": ((1,),), "c": ((0,), (1,))})
    cost = moving_cost(A_ALONE, only_c, three(2, 1), MACHINE, {"a": 5, "b": 3})
    # c comes to device 0: 1 s and 1 s of copying, for 5 of a and those that come.
    assert cost == pytest.approx(2.0 * (2 * 2.0 + 5))


@pytest.mark.parametrize("seed", range(20))
def test_one_decision_costs_at_most_twice_what_hindsight_would(seed: int) -> None:
    """Protects the ski rental, on rates that nobody foresees: never moving, or when, is known only later."""
    chance = random.Random(seed)
    control = Replacement(MACHINE)
    inflight = {"a": chance.randint(50, 400), "b": 0, "c": 0}  # makes the cost nearly constant
    control.planned(0.0, three(0.1, 4), A_ALONE, B_ALONE)
    control.tick(0.0, three(0.1, 4), A_ALONE, inflight)
    regrets, costs, paid = [], [], None
    for second in range(1, 400):
        demands = three(0.1, chance.choice((0.1, 1.0, 4.0)) if second % 7 == 0 else 0.2)
        regrets.append(regret_rate(A_ALONE, B_ALONE, demands, MACHINE))
        costs.append(moving_cost(A_ALONE, B_ALONE, demands, MACHINE, inflight))
        if paid is None and control.tick(float(second), demands, A_ALONE, inflight):
            paid = sum(regrets) + costs[-1]
            assert control.regret == 0
    online = sum(regrets) if paid is None else paid
    hindsight = min(sum(regrets), *(sum(regrets[:at]) + cost for at, cost in enumerate(costs)))
    assert online <= 2 * max(costs) / min(costs) * hindsight + max(regrets)


def swings(seed: int) -> tuple[float, float]:
    """Cost online and in hindsight of thirty swings between two plans, beyond what cannot be avoided."""
    chance = random.Random(seed)
    control = Replacement(MACHINE, ReplacementSettings(least_gain=0.0))
    plans, inflight = (A_ALONE, B_ALONE), {"a": 20, "b": 20}
    current, online, behind = A_ALONE, 0.0, [0.0, float("inf")]
    second, demands = 0.0, three(1, 1)
    for _ in range(30):
        demands = three(*chance.choice(((4.0, 0.2), (0.2, 4.0), (1.0, 1.0))))
        best = min(plans, key=lambda plan: estimate(plan, demands, MACHINE).normalized_latency)
        control.planned(second, demands, current, best)
        cost = moving_cost(*plans, demands, MACHINE, inflight)
        for _ in range(chance.randint(1, 40)):
            second += 1
            losing = [regret_rate(plan, best, demands, MACHINE) for plan in plans]
            behind = [min(behind[i], behind[1 - i] + cost) + losing[i] for i in (0, 1)]
            online += losing[plans.index(current)]
            if control.tick(second, demands, current, inflight):
                current, online = best, online + cost
                control.tick(second, demands, current, inflight)
    return online, min(behind)


@pytest.mark.parametrize("seed", range(5))
def test_swinging_rates_do_not_ruin(seed: int) -> None:
    """Protects against plans that are chased back and forth: at most four times hindsight, by theory."""
    online, hindsight = swings(seed)
    assert online <= 4 * hindsight
    assert hindsight <= online


# ------------------------------------------------------------------------------------------ planning


def test_planning_slows_down_while_nothing_changes() -> None:
    """Protects the processor: a search is not run every tick for a machine that is as it was."""
    settings = ReplacementSettings(min_interval_seconds=10, max_interval_seconds=35)
    control, now, waits = Replacement(MACHINE, settings), 0.0, []
    for _ in range(5):
        assert control.wants_plan(now, three(4, 1))
        control.planned(now, three(4, 1), A_ALONE, A_ALONE)
        waits.append(control.status(now, three(4, 1), A_ALONE, {}).next_planning_seconds)
        now += waits[-1]
    assert waits == [10, 20, 35, 35, 35]


def test_drift_brings_planning_forward() -> None:
    """Protects the reaction to a change: new rates do not wait for the long interval."""
    settings = ReplacementSettings(min_interval_seconds=10, max_interval_seconds=1000)
    control = Replacement(MACHINE, settings)
    for now in (0.0, 100.0, 300.0):
        control.planned(now, three(4, 1), A_ALONE, A_ALONE)
    assert not control.wants_plan(320, three(5, 1.2))
    assert control.wants_plan(320, three(9, 1))
    assert control.wants_plan(320, [*three(4, 1), demand("d", 1)])
    assert not control.wants_plan(305, three(9, 1))
    control.planned(320.0, three(9, 1), A_ALONE, A_ALONE)
    assert control.wants_plan(330, three(9, 1))


def test_a_move_is_made_once_regret_has_paid_for_it() -> None:
    """Protects the whole: regret grows, the steps come once, regret starts anew, planning is quick again."""
    control, demands, settings = Replacement(MACHINE), three(0.2, 4), ReplacementSettings()
    for now in (0.0, 20.0):
        control.planned(now, demands, A_ALONE, A_ALONE)
    control.planned(60.0, demands, A_ALONE, B_ALONE)
    rate = regret_rate(A_ALONE, B_ALONE, demands, MACHINE)
    cost = moving_cost(A_ALONE, B_ALONE, demands, MACHINE, {"b": 8})
    ticks = 0
    while not (order := control.tick(60.0 + ticks, demands, A_ALONE, {"b": 8})):
        assert control.regret == pytest.approx(rate * ticks)
        ticks += 1
    assert rate * (ticks - 1) < cost <= rate * ticks
    assert order == steps(A_ALONE, B_ALONE, demands, MACHINE)
    assert (
        control.tick(1000.0, demands, A_ALONE, {"b": 8}) == []
    )  # the move came to nothing, and took its time
    assert control.regret == 0
    assert control.status(60.0, demands, B_ALONE, {}).next_planning_seconds == settings.min_interval_seconds


def test_nothing_moves_for_services_that_were_not_planned_for() -> None:
    """Protects reloads of the configuration: an old plan is not moved to with new services."""
    control = Replacement(MACHINE)
    control.planned(0.0, three(0.1, 4), A_ALONE, B_ALONE)
    changed = [*three(0.1, 4), demand("d", 1)]
    assert [control.tick(at, changed, A_ALONE, {}) for at in (0.0, 1e6)] == [[], []]
    assert control.status(1e6, changed, A_ALONE, {}).best.same(A_ALONE)
    assert control.wants_plan(1e6, changed)


def test_a_plan_that_is_hardly_better_is_no_better() -> None:
    """Protects from moving for a prediction's noise."""
    control, demands = Replacement(MACHINE, ReplacementSettings(least_gain=0.9)), three(0.2, 4)
    control.planned(0.0, demands, A_ALONE, B_ALONE)
    assert control.status(0.0, demands, A_ALONE, {}).best.same(A_ALONE)


# ------------------------------------------------------------------------------------------ in words


def test_the_status_says_why_each_service_is_where_it_is() -> None:
    """Protects `seallmctl plan`: an operator reads what would change and what it would give."""
    demands = [*three(0.2, 4), demand("d", 0.01), demand("e", 0.1, gib=500)]
    demands.append(msgspec.structs.replace(demand("f", 0.0), placed=()))
    demands[2] = Demand("c", 0.5, 100, 200, demands[2].splits, placed=((1,),))
    control = Replacement(MACHINE)
    control.planned(0.0, demands, A_ALONE, B_ALONE)
    status = control.status(5.0, demands, A_ALONE, {"a": 2})
    reasons = {service.service: service.reason for service in status.services}
    assert status.best_normalized_latency < status.current_normalized_latency
    assert status.cost > status.regret == 0
    assert reasons["b"].startswith("on device 0, now on device 1, ")
    assert "placed by the operator" in reasons["c"]
    assert reasons["f"].startswith("absent, not asked for")
    assert "to be swapped in" in reasons["d"]
    assert reasons["e"] == "no group of devices can hold it"
    assert moves(A_ALONE, B_ALONE, demands[:4], MACHINE)[0] == "bring b on device 0"

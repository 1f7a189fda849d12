"""Planning: what a plan is predicted to give, and which plan is found."""

from __future__ import annotations

import random
import statistics

import msgspec
import pytest

from seallmd.core.baselines import alpa, one_each
from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.latency import Work, estimate
from seallmd.core.placement import _Planner, place
from seallmd.core.plan import Demand, Machine, Plan, Split, broken, groups_of
from seallmd.core.shapes import LayerShape, ModelShape
from tools.bench_placement import compare, draw

GIB = 1 << 30
TWO = Machine((80 * GIB, 80 * GIB), copy_bytes_per_second=20 * GIB, swap_seconds=0.5)


def demand(
    name: str,
    rate: float,
    *,
    gib: int = 20,
    ranks: tuple[int, ...] = (1, 2),
    placed: tuple[tuple[int, ...], ...] | None = None,
    output: float = 200,
) -> Demand:
    """A model whose steps take 10 ms and more, faster on more ranks."""
    splits = tuple(
        Split(r, gib * GIB // r, 500_000 / r, 0.01 / r**0.8, 1e-4 / r**0.8, 1e-7 / r**0.8, 1e-4 / r**0.8)
        for r in ranks
    )
    return Demand(name, rate, 100, output, splits, placed=placed)


def seconds(plan: dict[str, tuple[tuple[int, ...], ...]], *demands: Demand, machine: Machine = TWO) -> float:
    """Predicted latency of the first service."""
    return estimate(Plan(plan), demands, machine).services[demands[0].name].seconds


# --------------------------------------------------------------------------------------- prediction


def test_a_request_alone_takes_what_its_steps_take() -> None:
    """Protects the scale of predictions: without neighbours there is nothing to queue for."""
    alone = demand("a", 1e-6)
    prompt, output, context = 100, 200, 200
    expected = prompt * (1e-4 + 1e-7) + output * (0.01 + 1e-4 + context * 1e-7)
    assert seconds({"a": ((0,),)}, alone) == pytest.approx(expected, rel=0.01)


def test_neighbours_cost_in_proportion_to_their_presence() -> None:
    """Protects the cycle: an idle neighbour costs nothing, a busy one a step of its own for each of ours."""
    here = {"a": ((0,),), "b": ((0,),)}
    apart = seconds({"a": ((0,),), "b": ((1,),)}, demand("a", 0.01), demand("b", 1))
    idle = seconds(here, demand("a", 0.01), demand("b", 1e-6))
    busy = seconds(here, demand("a", 0.01), demand("b", 5))
    assert idle == pytest.approx(apart, rel=0.01)
    assert 1.9 * apart < busy < 3 * apart


def test_rows_obey_littles_law() -> None:
    """Protects the fixed point: the rows that the cycle was computed with are those that it leads to."""
    demands = [demand("a", 2), demand("b", 0.7), demand("c", 0.1)]
    plan = Plan({"a": ((0,), (1,)), "b": ((0, 1),), "c": ((1,),)})
    found = estimate(plan, demands, TWO)
    assert found.feasible
    for each in demands:
        service = found.services[each.name]
        assert service.rows == pytest.approx(each.rate * service.seconds, rel=1e-6)


def test_a_group_goes_as_its_slowest_device() -> None:
    """Protects overlapping groups: a neighbour on either device slows a tensor-parallel service alike."""
    demands = [demand("a", 0.1), demand("b", 2)]
    left = seconds({"a": ((0, 1),), "b": ((0,),)}, *demands)
    right = seconds({"a": ((0, 1),), "b": ((1,),)}, *demands)
    free = seconds({"a": ((0, 1),), "b": ()}, demand("a", 0.1), demand("b", 1e-6))
    assert left == pytest.approx(right)
    assert left > 1.5 * free


@pytest.mark.parametrize(
    ("demands", "limit"),
    [
        ([demand("a", 60)], "compute"),
        ([demand("a", 5, gib=79)], "memory"),
        ([demand("a", 20)], "rows"),
    ],
)
def test_an_overload_has_a_name_and_a_finite_price(demands: list[Demand], limit: str) -> None:
    """Protects the search in the infeasible: what lacks, and which overload is worse."""
    machine = Machine((80 * GIB,), 20 * GIB, max_rows=10_000 if limit != "rows" else 64)
    plan = Plan({"a": ((0,),)})
    found = estimate(plan, demands, machine)
    worse = estimate(
        plan, [demand("a", 2 * demands[0].rate, gib=demands[0].splits[0].weights_bytes // GIB)], machine
    )
    assert found.services["a"].limit == limit
    assert not found.feasible
    assert found.normalized_latency < worse.normalized_latency < float("inf")


def test_an_absent_service_pays_for_its_swap_twice_when_it_displaces() -> None:
    """Protects what absence costs: a copy, and the way back of a resident that had to leave."""
    one = Machine((80 * GIB,), copy_bytes_per_second=20 * GIB, swap_seconds=0.5)
    demands = [demand("a", 1e-3), demand("b", 1e-3, gib=40)]
    room = estimate(Plan({"b": ((0,),)}), demands, one).services["a"]
    full = estimate(Plan({"b": ((0,),)}), [demands[0], demand("b", 1e-3, gib=70)], one).services["a"]
    assert room.swap_seconds == pytest.approx(1.5)
    assert full.swap_seconds == pytest.approx(3.0)


def test_absent_services_wait_for_each_other() -> None:
    """Protects swapping from looking free: who is swapped often makes the others wait."""
    one = Machine((30 * GIB,), copy_bytes_per_second=20 * GIB)
    alone = estimate(Plan({}), [demand("a", 0.01)], one).services["a"]
    among = estimate(Plan({}), [demand("a", 0.01), demand("b", 0.1), demand("c", 0.1)], one).services["a"]
    assert among.swap_seconds > alone.swap_seconds + 0.5


def test_what_nothing_can_hold_is_said_to_be_nowhere() -> None:
    """Protects the operator's answer for a model that is too large."""
    found = estimate(Plan({}), [demand("a", 1, gib=300, ranks=(1,))], TWO)
    assert found.services["a"].limit == "nowhere"


def test_an_absent_service_too_large_for_one_device_comes_in_on_two() -> None:
    """Protects `seallmctl plan` from calling it impossible: demand brings it in on as many as hold it."""
    here = Plan({"b": ((0,),), "c": ((1,),)})
    others = [demand("b", 0.01), demand("c", 0.01)]
    found = estimate(here, [demand("a", 0.01, gib=120), *others], TWO).services["a"]
    assert not found.limit
    assert 0 < found.swap_seconds < 60


def test_a_split_predicts_what_the_learnt_costs_predict() -> None:
    """Protects the bridge from `StepCosts`: its scaled coefficients are not seconds per token."""
    shape = ModelShape("x", "float16", 2, (LayerShape(8, 128, 128),) * 4, (1 << 30,), 1000, 4096)
    costs = StepCosts.guess(ROOFLINES["h100"], shape)
    split = Split.of(1, shape.weights_bytes, shape.kv_bytes_per_token, costs)
    linear = split.fixed_seconds + 700 * split.token_seconds + 9000 * split.context_seconds
    assert linear == pytest.approx(costs.predict(700, 9000), rel=1e-6)


# ------------------------------------------------------------------------------------------- search


def test_the_search_is_close_to_all_plans_there_are() -> None:
    """Protects the quality of plans: against exhaustive search, overlapping groups included."""
    chance = random.Random(7)
    cases = [draw(chance.randrange(1 << 30), chance.randint(1, 2), chance.randint(1, 3)) for _ in range(36)]
    ratios = compare(cases, {"place": place})["place"]
    assert max(ratios) < 1.1
    assert statistics.mean(ratios) < 1.01


@pytest.mark.parametrize("seed", range(12))
def test_plans_can_exist_and_beat_the_baselines(seed: int) -> None:
    """Protects what the search is for: no arena is overdrawn, and simpler planners do no better."""
    demands, machine = draw(seed, 4, 9)
    plan = place(demands, machine)
    assert broken(plan, demands, machine) == ""
    found = estimate(plan, demands, machine).normalized_latency
    for rival in (alpa, one_each):
        assert found <= 1.001 * estimate(rival(demands, machine), demands, machine).normalized_latency


def test_planning_is_deterministic() -> None:
    """Protects the journal: the same demands give the same plan, in whatever order they come."""
    demands, machine = draw(3, 4, 9)
    assert place(demands, machine) == place(demands, machine)
    shuffled = random.Random(0).sample(demands, len(demands))
    assert place(shuffled, machine) == place(demands, machine)


def test_busy_neighbours_are_parted_and_replicated() -> None:
    """Protects the two things that every placement must do."""
    apart = place([demand("a", 3, ranks=(1,)), demand("b", 3, ranks=(1,))], TWO)
    assert sorted([*apart.of("a"), *apart.of("b")]) == [(0,), (1,)]
    assert len(place([demand("a", 20, ranks=(1,))], TWO).of("a")) == 2


def test_a_large_model_gets_a_group_and_a_small_one_its_place_beside_it() -> None:
    """Protects stage 1: the partition follows what the models need."""
    machine = Machine((80 * GIB,) * 4, 20 * GIB)
    plan = place([demand("large", 0.5, gib=120, ranks=(2, 4)), demand("small", 8, ranks=(1,))], machine)
    assert [len(group) for group in plan.of("large")] == [2]
    assert len(plan.of("small")) == 2


def test_what_does_not_fit_is_absent_and_what_is_called_most_is_not() -> None:
    """Protects the choice of who stays when memory is short."""
    one = Machine((80 * GIB,), 20 * GIB)
    demands = [demand(f"s{i}", rate, gib=30) for i, rate in enumerate((0.01, 0.5, 0.002, 0.4))]
    plan = place(demands, one)
    assert {name for name, groups in plan.replicas.items() if groups} == {"s1", "s3"}


def test_what_is_important_stays_although_it_is_called_less() -> None:
    """Protects the operator's word: rates are weighed by it."""
    one = Machine((80 * GIB,), 20 * GIB)
    demands = [demand(f"s{i}", rate, gib=30) for i, rate in enumerate((0.01, 0.5, 0.002, 0.4))]
    demands[0] = msgspec.structs.replace(demands[0], importance=100.0)
    plan = place(demands, one)
    assert {name for name, groups in plan.replicas.items() if groups} == {"s0", "s1"}


def test_replicas_and_groups_mix_on_the_same_devices() -> None:
    """Protects the end of the search on small machines: there, no partition is as good as what overlaps."""
    demands, machine = draw(299088013, 2, 2)
    plan = place(demands, machine)
    assert {len(plan.of(demand.name)) for demand in demands} == {1, 2}
    assert [len(group) for _, group in sorted(plan.placed())] in ([2, 1, 1], [1, 1, 2])


def test_a_small_device_may_join_a_large_one() -> None:
    """Protects mixed machines: of one small and two large devices, the small one is not always left over."""
    demands, machine = draw(491263128, 3, 1)
    assert machine.arena_bytes == (24 * GIB, 48 * GIB, 48 * GIB)
    assert sorted(map(len, place(demands, machine).of("service-0"))) == [1, 2]


def test_idle_services_take_room_that_nobody_needs() -> None:
    """Protects the first request to a service that nobody called yet."""
    assert len(place([demand("a", 0), demand("b", 0)], TWO).of("b")) >= 1


def test_the_operators_placement_is_kept_and_counted() -> None:
    """Protects `placed`: it overrides, also where it crosses the cells, and the others make way for it."""
    fixed = demand("a", 3, placed=((1, 2),))
    machine = Machine((80 * GIB,) * 4, 20 * GIB)
    plan = place([fixed, demand("b", 3, ranks=(1,)), demand("c", 1, placed=())], machine)
    assert plan.of("a") == ((1, 2),)
    assert plan.of("c") == ()
    assert {device for group in plan.of("b") for device in group} <= {0, 3}


def test_a_placement_that_cannot_run_is_refused() -> None:
    """Protects the operator from a plan that silently differs from the configuration."""
    with pytest.raises(ValueError, match="3 devices"):
        place([demand("a", 1, placed=((0, 1, 2),))], Machine((80 * GIB,) * 3, 20 * GIB))
    with pytest.raises(ValueError, match="there is not"):
        place([demand("a", 1, placed=((5,),))], TWO)
    with pytest.raises(ValueError, match="bytes"):
        place([demand("a", 1, gib=50, placed=((0,),)), demand("b", 1, gib=50, placed=((0,),))], TWO)


def test_a_placement_that_fits_one_device_of_a_cell_alone_is_kept() -> None:
    """Protects mixed machines: a cell that the placed replica does not fit is no place to search."""
    mixed = Machine((80 * GIB, 24 * GIB), 20 * GIB)
    plan = place([demand("a", 1, gib=40, placed=((0,),)), demand("b", 1, gib=16)], mixed)
    assert plan.of("a") == ((0,),)
    assert len(plan.of("b")) >= 1


def test_equal_devices_are_not_renamed() -> None:
    """Protects from moves for nothing: of plans that differ in names alone, the nearest is given."""
    demands = [demand("a", 3, ranks=(1,)), demand("b", 3, ranks=(1,)), demand("c", 2, ranks=(1,))]
    machine = Machine((80 * GIB,) * 3, 20 * GIB)
    current = Plan({"a": ((2,),), "b": ((0,),), "c": ((1,),)})
    assert place(demands, machine, near=current).same(current)


def test_unequal_devices_are_grouped_with_their_equals() -> None:
    """Protects stage 1 on mixed machines: a group is as large as the smallest of its devices."""
    machine = Machine((24 * GIB, 80 * GIB, 24 * GIB, 80 * GIB), 20 * GIB)
    assert groups_of(machine, 2) == [(1, 3), (0, 2)]
    assert place([demand("a", 1, gib=100, ranks=(2,))], machine).of("a") == ((1, 3),)


def test_many_devices_do_not_mean_many_partitions() -> None:
    """Protects stage 1 from blowing up: 32 devices have 165 multisets of sizes, and far more partitions."""
    demands, machine = draw(0, 32, 6, load=0.5)
    planner = _Planner(demands, machine, None)
    planner.best()
    assert len(planner._filled) < 80


def test_replicas_fill_a_large_machine() -> None:
    """Protects the replicas of stage 2 where nothing else would add them: no device is left idle."""
    demands = [demand(f"s{i:02}", 8.0, ranks=(1,)) for i in range(10)]
    plan = place(demands, Machine((80 * GIB,) * 32, 20 * GIB))
    assert {device for _, group in plan.placed() for device in group} == set(range(32))


def test_placed_replicas_count_where_they_are() -> None:
    """Protects the cells beside a placed replica: what spans two of them weighs on both, and on no other."""
    fixed = [demand("a", 3, placed=((1, 2),)), demand("b", 1)]
    planner = _Planner(fixed, Machine((80 * GIB,) * 6, 20 * GIB), None)
    cells = planner._fill([(0, 1), (2, 3), (4, 5)]).cells
    assert [[guest.touched for guest in cell.placed] for cell in cells] == [[2], [2], []]


def test_a_machine_without_devices_has_an_empty_plan() -> None:
    """Protects the moments before the first worker is up."""
    assert place([demand("a", 1)], Machine((), 1.0)) == Plan({"a": ()})
    assert place([], TWO) == Plan({})


def test_work_counts_idle_services_a_little() -> None:
    """Protects divisions: rates and outputs of zero are legal demands."""
    nothing = demand("a", 0, output=0)
    work = Work.of(nothing, nothing.splits[0], TWO)
    assert work.rate > 0
    assert work.weight > 0

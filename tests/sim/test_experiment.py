"""The simulator against closed forms, and that it repeats itself."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from seallmd.config import DeviceSettings
from seallmd.core.cost import ROOFLINES, Roofline, Work
from seallmd.core.events import Action, Arrived, Event
from seallmd.core.messages import Sampling
from seallmd.core.settings import NodeSettings, PolicySettings, ServiceSettings
from seallmd.core.shapes import LayerShape, ModelShape
from seallmd.runtime.devices import plan
from seallmd.sim import experiment
from seallmd.sim.device import STOP
from seallmd.sim.experiment import Outcome, Setup
from seallmd.sim.metrics import Served
from seallmd.sim.models import SimError, parse_models
from seallmd.sim.timing import Costs, isolated_seconds
from seallmd.sim.workload import Arrival, Lengths, synthetic
from seallmd.sim.world import World

BLOCK = 1 << 16
SHAPE = ModelShape("tiny", "float16", 2, (LayerShape(1, 64, 64),), (BLOCK * 4,), 100, 4096)
DEVICE = Roofline("unit", 1e12, 1e7, 1e9, step_seconds=0.1, memory_bytes=BLOCK * 2000, efficiency=1.0)
PROMPT = 20
WORK = Work.of(SHAPE)
STEP_SECONDS = DEVICE.step(WORK, PROMPT, PROMPT, 1)  # one request: its prompt, and its only token
ONE_BY_ONE = PolicySettings(max_rows=1, pipeline_depth=1)


def one_server(rate: float, seconds: float, cv: float) -> Outcome:
    """A queue with one server and deterministic service: each request is one step of its own."""
    lengths = Lengths(PROMPT, 1, sigma=0.0)
    arrivals = synthetic(["a"], rate=rate, seconds=seconds, alpha=1.0, seed=3, cv=cv, lengths=lengths)
    setup = Setup({"a": SHAPE}, (DEVICE,), arrivals, policy="fcfs", limits=ONE_BY_ONE, block_bytes=BLOCK)
    return experiment.run(setup)


@pytest.fixture(scope="module")
def md1() -> Outcome:
    """An M/D/1 queue that is busy half of the time."""
    return one_server(rate=0.5 / STEP_SECONDS, seconds=3000.0, cv=1.0)


def test_every_wait_follows_the_queue(md1: Outcome) -> None:
    """Protects the order of events: Lindley's recursion gives each single finish."""
    free = 0.0
    for served in md1.served:
        free = max(free, served.arrived) + STEP_SECONDS
        assert served.finished == pytest.approx(free, abs=1e-6)


def test_mean_wait_is_that_of_an_md1_queue(md1: Outcome) -> None:
    """Protects arrivals and service together: Pollaczek-Khinchine, rho S / (2 (1 - rho))."""
    waits = [served.latency - STEP_SECONDS for served in md1.served]
    rho = len(waits) * STEP_SECONDS / 3000.0
    assert sum(waits) / len(waits) == pytest.approx(rho * STEP_SECONDS / (2 * (1 - rho)), rel=0.05)


def test_bursts_wait_longer() -> None:
    """Protects the meaning of cv: Kingman's bound grows with the square of the arrivals' variation."""
    waits = {
        cv: sum(served.latency for served in one_server(0.5 / STEP_SECONDS, 200.0, cv).served)
        for cv in (0.0, 1.0, 3.0)
    }
    assert waits[0.0] < waits[1.0] < waits[3.0]


def test_devices_are_busy_for_the_work_there_is(md1: Outcome) -> None:
    """Protects utilisation: requests times the time of one, no useless steps."""
    assert md1.busy_seconds == [pytest.approx(len(md1.served) * STEP_SECONDS)]


def test_littles_law() -> None:
    """Protects the records: the time-integral of requests in the node is the sum of their latencies."""
    settings = NodeSettings(
        services=(ServiceSettings(name="a", model="a"),), devices=1, block_bytes=BLOCK, host_bytes=1 << 40
    )
    lengths: dict[int, int] = {}
    integral, last, present = 0.0, 0.0, 0
    finished: dict[int, float] = {}

    def observe(_event: Event, actions: list[Action]) -> None:
        nonlocal integral, last, present
        integral += present * (world.now - last)
        last, present = world.now, len(world.node.state.requests)
        for action in actions:
            if type(action).__name__ == "Finish":
                finished[action.request] = world.now  # type: ignore[union-attr]

    world = World(settings, {"a": SHAPE}, (BLOCK * 100,), Costs(), observe, lengths=lengths)
    world.start()
    world.run()
    arrived = {}
    for number in range(1, 200):
        world.run(until=20.0 + number * 0.03)
        lengths[number], arrived[number] = 10 + number % 50, world.now
        prompt = (number, *range(8))
        world.happen(Arrived(number, "a", prompt, 400, Sampling(temperature=0.0), (STOP,)))
    world.run()
    assert len(finished) == 199
    latencies = sum(finished[number] - at for number, at in arrived.items())
    assert integral == pytest.approx(latencies, rel=1e-9)


# ------------------------------------------------------------------------------------- whole runs


def mixed(policy: str = "budget", seed: int = 1, **changes: object) -> Setup:
    """Two models on a device, a little too much work."""
    shapes = parse_models("2*smollm2-135m")
    lengths = Lengths(60, 20)
    arrivals = synthetic(list(shapes), rate=2, seconds=20, alpha=0.9, seed=seed, lengths=lengths)
    fields: dict[str, object] = {"policy": policy, "block_bytes": 1 << 19, **changes}
    return Setup(shapes, (ROOFLINES["cpu"],), arrivals, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", experiment.policies())
def test_all_get_all_their_tokens(policy: str) -> None:
    """Protects every policy in every world: lengths come out exactly, times never fall."""
    outcome = experiment.run(mixed(policy))
    assert len(outcome.served) > 20
    for served in outcome.served:
        assert not served.error
        assert len(served.times) == served.output
        times = [served.arrived, *served.times, served.finished]
        assert times == sorted(times)


def test_the_same_seed_gives_the_same_run() -> None:
    """Protects comparisons: the only difference between two runs is what was changed."""

    def times(seed: int) -> list[array[float]]:
        return [served.times for served in experiment.run(mixed(seed=seed)).served]

    assert times(1) == times(1)
    assert times(1) != times(2)


def test_alone_is_never_faster_than_isolated() -> None:
    """Protects T_iso: one request at a time on a dedicated device has a slowdown of 1."""
    shapes = parse_models("smollm2-135m")
    (name,) = shapes
    arrivals = [Arrival(100.0 * n, name, 200, 50) for n in range(3)]
    setup = Setup(shapes, (ROOFLINES["cpu"],), arrivals, policy="dedicated", block_bytes=1 << 19)
    report = experiment.run(setup).report("alone", setup, 0.01)
    assert report.normalized_latency == pytest.approx(1.0, rel=0.02)
    assert report.overall.slowdown.p99 >= 0.999


def test_dedicated_gives_each_service_a_device() -> None:
    """Protects the baseline: no interference, one device per service."""
    setup = replace(mixed("dedicated"), devices=(ROOFLINES["cpu"],) * 2)
    outcome = experiment.run(setup)
    assert len(outcome.devices) == len(outcome.busy_seconds) == 2
    assert outcome.swaps == 0
    shared = experiment.run(mixed("round-robin"))
    assert sum(s.latency for s in outcome.served) < sum(s.latency for s in shared.served)


def test_who_is_not_done_in_time_has_failed() -> None:
    """Protects honest figures under overload: unfinished requests do not vanish."""
    outcome = experiment.run(mixed(drain_seconds=0.5))
    unfinished = [served for served in outcome.served if served.error == "unfinished"]
    assert unfinished
    assert all(math.isnan(served.finished) for served in unfinished)


def test_what_does_not_fit_is_refused_and_said() -> None:
    """Protects the operator of an experiment from a service that silently got nothing."""
    shapes = parse_models("llama-65b,llama-7b")
    large, small = shapes
    arrivals = [Arrival(0.0, large, 10, 2), Arrival(0.0, small, 10, 2)]
    outcome = experiment.run(Setup(shapes, (ROOFLINES["a100-80g"],), arrivals))
    assert list(outcome.refused) == [large]
    failed: dict[str, str] = {s.service: s.error for s in outcome.served}
    assert "cannot be served" in failed[large]
    assert not failed[small]


def test_a_window_of_steps_and_samples_of_memory() -> None:
    """Protects the charts: spans lie in their window on one device without overlap, memory adds up."""
    outcome = experiment.run(mixed(span_window=(2.0, 6.0), sample_seconds=1.0))
    steps = sorted((s for s in outcome.spans if s.kind == "step"), key=lambda span: span.began)
    assert steps
    assert all(span.ended > 2.0 and span.began < 6.0 for span in steps)
    ends = [(first.ended, second.began) for first, second in pairwise(steps)]
    assert all(end <= begin + 1e-9 for end, begin in ends)
    assert len({round(sum(s.weights.values()) + s.kv + s.cached + s.free, 3) for s in outcome.occupancy}) == 1
    assert len(outcome.occupancy) >= 20


def test_isolated_time_by_hand() -> None:
    """Protects T_iso's formula: prompt at once, then one step per further token."""
    step = DEVICE.step(WORK, 1, 10 + 2, 1)
    assert isolated_seconds(DEVICE, WORK, 10, 4) == pytest.approx(DEVICE.step(WORK, 10, 10, 1) + 3 * step)


def test_nonsense_is_refused() -> None:
    """Protects against a run that measures nothing."""
    with pytest.raises(SimError, match="policy"):
        experiment.run(mixed("no-such-policy"))
    with pytest.raises(SimError, match="no requests"):
        experiment.run(Setup({"a": SHAPE}, (DEVICE,), []))


def test_records_are_comparable() -> None:
    """Protects `Served.latency`, which all figures begin with."""
    assert Served("a", 1.0, 1, 1, array("d", [2.0]), 2.5).latency == 1.5


def test_budget_beats_turns_in_the_tail_and_in_the_mean() -> None:
    """Protects the point of the default policy: below round-robin in mean and in P99 of the slowdown."""
    shapes = parse_models("4*llama-7b,2*llama-13b")
    arrivals = synthetic(list(shapes), rate=4, seconds=40, alpha=0.9, seed=0)
    found = {}
    for policy in ("budget", "round-robin"):
        setup = Setup(
            shapes,
            (ROOFLINES["a100-80g"],) * 2,
            arrivals,
            policy=policy,
            limits=PolicySettings(replicate=False),
        )
        found[policy] = experiment.run(setup).report(policy, setup, 4.0)
    budget, turns = found["budget"], found["round-robin"]
    assert budget.normalized_latency < 0.96 * turns.normalized_latency
    assert budget.overall.slowdown.p99 < turns.overall.slowdown.p99
    assert budget.overall.ms_per_token.mean < 0.9 * turns.overall.ms_per_token.mean


# -------------------------------------------------------------------------------- KV in host memory


def short_of_memory(host_kv_bytes: int | None) -> Outcome:
    """Answers that outgrow the KV that there is beside the weights."""
    shapes = parse_models("1*smollm2-135m")
    device = msgspec.structs.replace(ROOFLINES["cpu"], memory_bytes=640 << 20)
    lengths = Lengths(100, 60)
    arrivals = synthetic(list(shapes), rate=4, seconds=8, alpha=0.9, seed=1, lengths=lengths)
    return experiment.run(
        Setup(shapes, (device,), arrivals, block_bytes=1 << 19, host_kv_bytes=host_kv_bytes)
    )


def test_preempted_kv_goes_to_host_memory_as_in_the_daemon(tmp_path: Path) -> None:
    """By default as much of it as `[devices] host_kv` is by default; it comes back, and answers are whole."""
    arena = round(640 * 0.9)
    daemon = plan(DeviceSettings(kind="cpu", memory=f"{arena} MiB", cache=str(tmp_path)))
    default, said = short_of_memory(None), short_of_memory(daemon.host_kv_bytes)
    assert default.saves > 0
    assert [s.times for s in default.served] == [s.times for s in said.served]
    assert all(len(s.times) == s.output for s in default.served)


def test_without_host_memory_kv_is_computed_again() -> None:
    """Nothing is saved then, and the devices have more to do."""
    without, with_it = short_of_memory(0), short_of_memory(None)
    assert without.preemptions > 0
    assert without.saves == 0
    assert sum(without.busy_seconds) > sum(with_it.busy_seconds)

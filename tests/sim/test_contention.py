"""Steps on devices that share a memory slow each other down."""

from __future__ import annotations

import pytest

from seallmd.core.cost import ROOFLINES
from seallmd.sim.contention import Contention
from seallmd.sim.experiment import Setup, run
from seallmd.sim.models import parse_devices, parse_models
from seallmd.sim.workload import Arrival
from seallmd.sim.world import World
from tests.core.helpers import shape, world


def _world() -> World:
    return world({"a": shape()}).world


def test_steps_that_overlap_go_slower_while_they_do() -> None:
    """Protects the pace: alone for half a second, together at half speed, alone again."""
    clock, ended = _world(), dict[str, tuple[float, float]]()
    start = clock.now
    contention = Contention(clock, {0: 1.0, 1: 1.0})
    contention.run(0, 1.0, lambda seconds: ended.update(a=(clock.now - start, seconds)))
    clock.after(
        0.5, lambda: contention.run(1, 1.0, lambda seconds: ended.update(b=(clock.now - start, seconds)))
    )
    clock.run()
    assert ended["a"] == pytest.approx((1.5, 1.5))
    assert ended["b"] == pytest.approx((2.0, 1.5))


def test_a_device_that_is_gone_slows_nobody() -> None:
    """Protects the survivors of a worker's death from the dead one's step."""
    clock, ended = _world(), dict[str, float]()
    contention = Contention(clock, {0: 1.0, 1: 1.0})
    contention.run(0, 1.0, lambda seconds: ended.update(a=seconds))
    contention.run(1, 1.0, lambda seconds: ended.update(b=seconds))
    clock.after(1.0, lambda: contention.stop(1))
    clock.run()
    assert ended == {"a": pytest.approx(1.5)}


def test_cpu_workers_contend_and_gpus_do_not() -> None:
    """Protects predictions for CPU workers: two busy ones are not twice as fast as one."""
    shapes = parse_models("a=smollm2-135m,b=smollm2-135m", 1024)
    arrivals = [Arrival(0.0, "a", 64, 200), Arrival(0.0, "b", 64, 200)]
    one = run(Setup(shapes, parse_devices("2*cpu@3"), arrivals[:1])).served[0].finished
    both = run(Setup(shapes, parse_devices("2*cpu@3"), arrivals)).served
    slower = 1 + ROOFLINES["cpu"].contention
    assert [record.finished for record in both] == pytest.approx([one * slower] * 2, rel=0.01)
    one = run(Setup(shapes, parse_devices("2*a100-80g"), arrivals[:1])).served[0].finished
    both = run(Setup(shapes, parse_devices("2*a100-80g"), arrivals)).served
    assert [record.finished for record in both] == pytest.approx([one] * 2, rel=0.01)

"""Over how many devices a service is split when nobody has said so."""

from __future__ import annotations

import pytest

from seallmd.core.cost import ROOFLINES
from seallmd.core.splitting import worthwhile_ranks
from seallmd.sim.models import MODELS
from tests.core.helpers import Recorder, shape, world


@pytest.mark.parametrize(
    ("model", "fewest", "efficiency", "ranks"),
    [
        ("llama-7b", 1, 1.0, []),
        ("llama-7b", 1, 0.7, [2]),  # 13.2 ms on one A100, 8.9 ms on two: 0.74 of their speed
        ("llama-30b", 1, 0.7, [4, 2]),
        ("llama-65b", 2, 0.7, [8, 4]),
    ],
)
def test_large_models_are_worth_more_devices(
    model: str, fewest: int, efficiency: float, ranks: list[int]
) -> None:
    """The larger the model, the less of a step is fixed cost and sums over ranks."""
    found = worthwhile_ranks(MODELS[model].shape(), ROOFLINES["a100-80g"], fewest, efficiency)
    assert found == ranks


def test_sums_over_cpu_workers_are_worth_nothing() -> None:
    """A model that one worker runs in 17 ms is not split for sums that take as long as its steps."""
    assert not worthwhile_ranks(MODELS["smollm2-135m"].shape(), ROOFLINES["cpu"], 1, 0.5)


def ranks_of(recorder: Recorder) -> int:
    """Of the service's replica, once a request has been answered."""
    recorder.arrive(1, "a", (1, 2, 3), 5)
    recorder.world.run()
    recorder.assert_output(1)
    (replica,) = recorder.world.node.state.services["a"].replicas
    return len(replica.devices)


SPLITTABLE = shape(ranks=(2, 4))


def test_a_service_comes_in_on_as_many_devices_as_are_worth_it() -> None:
    """From its first load on, its answers right; and no more than the machine has."""
    assert ranks_of(world({"a": SPLITTABLE}, arenas=(40,) * 4)) == 1
    assert ranks_of(world({"a": SPLITTABLE}, arenas=(40,) * 4, split_efficiency=0.1)) == 4
    assert ranks_of(world({"a": SPLITTABLE}, arenas=(40,) * 3, split_efficiency=0.1)) == 2
    assert ranks_of(world({"a": SPLITTABLE}, split_efficiency=0.1)) == 1


def test_nothing_is_split_where_devices_are_few() -> None:
    """Services that share devices anyway gain nothing from sharing more of them."""
    services = {"a": SPLITTABLE, "b": SPLITTABLE, "c": SPLITTABLE}
    assert ranks_of(world(services, arenas=(40,) * 2, split_efficiency=0.1)) == 1
    assert ranks_of(world(services, arenas=(40,) * 3, split_efficiency=0.1)) == 2


def test_the_operators_word_goes_before() -> None:
    """tensor_parallel of a service, and a policy that shares no device."""
    fixed = world({"a": SPLITTABLE}, arenas=(40,) * 4, split_efficiency=0.1, tensor_parallel={"a": 2})
    assert ranks_of(fixed) == 2
    assert ranks_of(world({"a": SPLITTABLE}, arenas=(40,) * 4, split_efficiency=0.1, policy="dedicated")) == 1

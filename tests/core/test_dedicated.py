"""Where dedicated services may be."""

from __future__ import annotations

from seallmd.core import dedicated
from tests.core.helpers import shape, world


def test_each_service_has_its_own_devices() -> None:
    """Protects the baseline: dealt out over all devices, the same every time, groups as wide as they are."""
    services = {"a": shape(), "pair": shape(ranks=(2,)), "c": shape()}
    state = world(dict(services), (40,) * 3, policy="dedicated", tensor_parallel={"pair": 2}).world.node.state
    own = [
        [d.index for d in dedicated.own_devices(state, service, service.ranks)]
        for service in state.services.values()
    ]
    assert own == [[0], [1, 2], [0]]


def test_one_at_a_time_on_a_device_and_nobody_is_pushed_out() -> None:
    """Protects what a swapping proxy does: the newcomer waits until the one before has finished."""
    recorder = world({"a": shape(), "b": shape()}, (100,), policy="dedicated", patience_seconds=0.1)
    recorder.arrive(1, "a", (1,), 50)
    recorder.world.run(until=recorder.world.now + 0.3)
    recorder.arrive(2, "b", (1,), 5)
    recorder.arrive(3, "a", (2,), 5)  # behind b: it waits for the device too
    ended: list[int] = []
    while recorder.world.step():
        ended += [request for request in recorder.finished if request not in ended]
        assert len(recorder.world.node.state.devices[0].replicas) <= 1
    assert ended == [1, 2, 3]
    for request in ended:
        recorder.assert_output(request)

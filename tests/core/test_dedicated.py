"""Where dedicated services may be."""

from __future__ import annotations

import msgspec

from seallmd.core.dedicated import NAME, allowed_device, in_the_way
from seallmd.core.settings import NodeSettings, SchedulerSettings, ServiceSettings
from tests.core.helpers import shape, world


def node(policy: str) -> NodeSettings:
    services = tuple(ServiceSettings(name=name, model=name) for name in "abcde")
    scheduler = msgspec.structs.replace(SchedulerSettings(), policy=policy)
    return NodeSettings(services=services, devices=3, block_bytes=1, host_bytes=1, scheduler=scheduler)


def test_each_service_has_one_device() -> None:
    """Protects the baseline: spread over all devices, the same one every time; no limit otherwise."""
    assert [allowed_device(node(NAME), index) for index in range(5)] == [0, 1, 2, 0, 1]
    assert allowed_device(node("budget"), 4) is None


def test_everybody_else_is_in_the_way() -> None:
    """Protects `one at a time`: a device is empty before its next service comes in."""
    recorder = world({"a": shape(), "b": shape()}, (100,), preload=("a", "b"))
    state = recorder.world.node.state
    leaving = in_the_way(state.devices[0], state.services["a"])
    assert [replica.service for replica in leaving] == ["b"]

"""What must be true of a node after every event.

Owns the checks that span several structs; each struct's own are beside it (`Arena.check`). Must not change
anything. Used by every test and simulation, and by the daemon when asked to.
"""

from __future__ import annotations

from collections import Counter

from seallmd.core.state import Device, Life, NodeState, Stage


def check_node(state: NodeState) -> None:
    """Raise AssertionError on the first broken invariant."""
    _check_requests(state)
    for device in state.devices.values():
        _check_device(state, device)
    for service in state.services.values():
        assert list(service.waiting) == sorted(service.waiting), "waiting is not in order of arrival"
        assert not (service.refused and (service.waiting or service.replicas))
        for replica in service.replicas:
            assert state.devices[replica.device].replicas.get(service.name) is replica


def _check_requests(state: NodeState) -> None:
    places = Counter(r.id for s in state.services.values() for r in [*s.waiting.values(), *s.running])
    assert set(places) == set(state.requests), "a request is nowhere, or somewhere though it has ended"
    assert all(count == 1 for count in places.values()), "a request is in two places"
    rows = Counter(
        row.request.id for d in state.devices.values() for s in d.inflight.values() for row in s.rows
    )
    for request in state.requests.values():
        generated = len(request.tokens) - request.prompt
        assert 0 <= request.computed <= request.scheduled
        assert generated <= request.drawn <= request.max_tokens
        assert rows[request.id] == request.inflight
        if request.inflight == 0:
            assert generated == request.drawn, f"request {request.id}: a drawn token never came"
        if request.life is Life.WAITING:
            assert not request.blocks
            assert request.scheduled == 0
            assert state.services[request.service].waiting[request.order] is request


def _check_device(state: NodeState, device: Device) -> None:
    if device.arena is None:
        assert not device.replicas
        assert not device.inflight
        return
    device.arena.check()
    held: Counter[int] = Counter()
    weights = 0
    for replica in device.replicas.values():
        service = state.services[replica.service]
        assert replica.stage is not Stage.COPYING or not replica.running
        assert device.arena.weights_of(service.name) == sum(service.segment_blocks)
        weights += device.arena.weights_of(service.name)
        size = service.block_tokens
        for request in replica.running.values():
            assert request.life is Life.RUNNING
            assert request.device == device.index
            assert len(request.blocks) == -(-request.scheduled // size), "a table is too long or too short"
            held.update(request.blocks)
    assert weights == device.arena.weights, "weights of a service that is not here"
    assert len(held) == device.arena.kv, "KV that no request holds"
    for block, count in held.items():
        assert device.arena.refs(block) == count, f"block {block} has {device.arena.refs(block)} refs"
    assert len(device.inflight) <= state.settings.scheduler.pipeline_depth

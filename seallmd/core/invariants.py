"""What must be true of a node after every event.

Owns the checks that span several structs; each struct's own are beside it (`Arena.check`). Must not change
anything. Used by every test and simulation, and by the daemon when asked to.
"""

from __future__ import annotations

from collections import Counter

from seallmd.core.examination import awaits_examination
from seallmd.core.outlook import look
from seallmd.core.request import Life
from seallmd.core.service import Stage
from seallmd.core.state import Device, NodeState


def check_node(state: NodeState) -> None:
    """Raise AssertionError on the first broken invariant."""
    _check_requests(state)
    _check_places(state)
    assert not state.examined or state.host_up
    if state.host_up and not state.examined:
        assert not any(map(awaits_examination, state.services.values())), "nobody examines the next model"
    state.host_kv.check(request.saved for request in state.requests.values() if request.saved is not None)
    for device in state.devices.values():
        _check_device(state, device)
    for service in state.services.values():
        assert list(service.waiting) == sorted(service.waiting), "waiting is not in order of arrival"
        urgent = [request for request in service.waiting.values() if not request.deferred]
        assert service.urgent == len(urgent)
        assert service.waiting_tokens == sum(len(request.tokens) for request in urgent)
        assert not (service.refused and (service.waiting or service.replicas))
        for replica in service.replicas:
            assert len(replica.devices) == service.ranks == len(set(replica.devices))
            for device in state.group(replica):
                assert device.replicas.get(service.name) is replica
            if (known := service.outlooks.get(replica.copy)) is not None:
                assert known == look(state, replica), f"{service.name} has changed, and nobody was told"


def _check_places(state: NodeState) -> None:
    """What is kept of who is where is what would be found anew."""
    assert state.absent == [service for service in state.services.values() if not service.replicas]
    for device in state.devices.values():
        beside = state.devices_of(r for name in device.replicas for r in state.services[name].replicas)
        assert state.beside(device.index) == beside, "somebody came or went, and nobody was told"


def _check_requests(state: NodeState) -> None:
    places = Counter(r.id for s in state.services.values() for r in [*s.waiting.values(), *s.running])
    assert set(places) == set(state.requests), "a request is nowhere, or somewhere though it has ended"
    assert all(count == 1 for count in places.values()), "a request is in two places"
    rows = Counter(
        row.request.id
        for device in state.devices.values()
        for step in device.inflight.values()
        if step.leader == device.index
        for row in step.rows
    )
    for request in state.requests.values():
        generated = len(request.tokens) - request.prompt
        assert 0 <= request.computed <= request.scheduled
        assert generated <= request.drawn <= request.max_tokens
        assert rows[request.id] == request.inflight
        if request.inflight == 0:
            assert generated == request.drawn, f"request {request.id}: a drawn token never came"
        if request.life is Life.WAITING:
            assert not request.tables
            assert request.replica is None
            assert request.scheduled == 0
            assert state.services[request.service].waiting[request.order] is request
        else:
            assert (request.saved is not None) == request.landing
            assert not (request.landing and request.announced)


def _check_device(state: NodeState, device: Device) -> None:
    if device.arena is None:
        assert not device.replicas
        assert not device.inflight
        assert device.reserved is None
        return
    device.arena.check()
    held: Counter[int] = Counter()
    weights = 0
    for replica in device.replicas.values():
        service = state.services[replica.service]
        assert replica.stage is not Stage.COPYING or not replica.running
        for stranger in state.strangers(device, replica.service):
            stages = {replica.stage, stranger.stage}
            assert Stage.DRAINING in stages, f"{replica.service} is beside {stranger.service}"
        assert not device.closed or replica.stage is Stage.DRAINING, "it stays on a drained device"
        assert device.arena.weights_of(service.name) == sum(service.segment_blocks)
        weights += device.arena.weights_of(service.name)
        rank = replica.devices.index(device.index)
        for request in replica.running.values():
            assert request.life is Life.RUNNING
            assert request.replica is replica
            table = request.tables[rank]
            assert len(table) == service.blocks_for(request.scheduled), "a table is too long or too short"
            held.update(table)
    assert weights == device.arena.weights, "weights of a service that is not here"
    assert len(held) == device.arena.kv, "KV that no request holds"
    for block, count in held.items():
        assert device.arena.refs(block) == count, f"block {block} has {device.arena.refs(block)} refs"
    assert len(device.inflight) <= state.settings.policy.pipeline_depth
    if device.reserved is not None:
        assert device.replicas.get(device.reserved.service) is device.reserved

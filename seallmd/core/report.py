"""Turns a node's state into its report (`core.status`).

Owns the wording of states. Must not change anything.
"""

from __future__ import annotations

from seallmd.core.estimate import coming_seconds
from seallmd.core.idle import expires_seconds, idle_since
from seallmd.core.places import Places
from seallmd.core.profile import Lengths
from seallmd.core.request import Life, Request
from seallmd.core.service import Image, Replica, Service, Stage
from seallmd.core.state import Device, NodeState
from seallmd.core.status import (
    DeviceStatus,
    NodeStatus,
    Place,
    RequestStatus,
    ServiceDetail,
    ServiceStatus,
)


def node_status(state: NodeState, places: Places, now: float) -> NodeStatus:
    """The report at `now`."""
    return NodeStatus(
        policy=state.settings.policy.scheduler,
        draining=state.draining,
        block_bytes=state.settings.block_bytes,
        devices=tuple(_device(state, device) for device in state.devices.values()),
        services=tuple(_service(state, places, service, now) for service in state.services.values()),
    )


def _device(state: NodeState, device: Device) -> DeviceStatus:
    unit, arena = state.settings.block_bytes, device.arena
    return DeviceStatus(
        device=device.index,
        label=device.label,
        pid=device.pid,
        state=device.state,
        capacity_bytes=arena.capacity * unit if arena else 0,
        weights_bytes=arena.weights * unit if arena else 0,
        kv_bytes=arena.kv * unit if arena else 0,
        free_bytes=arena.available * unit if arena else 0,
        cached_bytes=arena.cached * unit if arena else 0,
        host_kv_bytes=state.host_kv.used(device.index) * unit,
        steps=device.steps,
        drained=device.closed,
    )


def _service(state: NodeState, places: Places, service: Service, now: float) -> ServiceStatus:
    shape = service.shape
    replica = service.replicas[0] if service.replicas else None
    fraction = None
    if service.progress is not None:
        _, done, total = service.progress
        fraction = done / total if total else 0.0
    blocks = {
        (device, block)
        for request in service.running
        if request.replica is not None
        for device, table in zip(request.replica.devices, request.tables, strict=True)
        for block in table
    }
    return ServiceStatus(
        name=service.name,
        model=service.settings.model,
        state=service_state(service),
        pinned=service.settings.pinned,
        device=replica.leader if replica else None,
        stage=fraction,
        weights_bytes=shape.weights_bytes if shape else 0,
        kv_bytes=len(blocks) * state.settings.block_bytes,
        context=places.context_limit(service) if shape else service.settings.context,
        dtype=shape.dtype if shape else service.settings.dtype,
        running=sum(1 for _ in service.running),
        waiting=len(service.waiting),
        tokens_per_second=service.rate.value(now),
        prompt_tokens=service.prompt_tokens,
        output_tokens=service.output_tokens,
        preemptions=service.preemptions,
        swaps_in=service.swaps_in,
        last_swap_seconds=service.last_swap_seconds,
        reason=service.refused or service.trouble,
        devices=tuple(sorted(device for r in service.replicas for device in r.devices)),
        groups=tuple(r.devices for r in service.replicas),
        saves=service.saves,
        migrations=service.migrations,
        cost_error=service.profile.costs.error if service.profile else 0.0,
        coming_seconds=coming_seconds(state, service) if shape and not service.refused else 0.0,
        cached_tokens=service.cached_tokens,
        swap_seconds=service.swap_seconds,
        drained=service.closed,
        leaving=service.outgoing,
        idle_seconds=max(0.0, now - idle_since(service, now)),
        expires_seconds=expires_seconds(service, now),
    )


def service_state(service: Service) -> str:
    """One word for where a service stands."""
    if service.refused:
        return "refused"
    if service.shape is None:
        return "probing"
    if service.replicas:
        return service.replicas[0].stage.value
    if service.image is Image.BUILDING:
        return "reading"
    return "absent"


def service_detail(state: NodeState, status: ServiceStatus, now: float) -> ServiceDetail:
    """All that is known at `now` of the service that `status` is about."""
    service = state.services[status.name]
    return ServiceDetail(
        status=status,
        settings=service.settings,
        shape=service.shape,
        profile=service.profile,
        kv_bytes_per_token=service.shape.kv_bytes_per_token if service.shape else 0,
        places=tuple(
            Place(
                device=replica.leader,
                devices=replica.devices,
                state=replica.stage.value,
                weights_bytes=state.weights_blocks(service) * state.settings.block_bytes,
                running=len(replica.running),
                idle_seconds=max(0.0, now - max(replica.used, replica.began)),
                operations=replica.operations,
            )
            for replica in service.replicas
        ),
        prompt_quantiles=_quantiles(service.profile.prompts) if service.profile else (0.0, 0.0),
        output_quantiles=_quantiles(service.profile.outputs) if service.profile else (0.0, 0.0),
    )


def _quantiles(lengths: Lengths) -> tuple[float, float]:
    return lengths.quantile(0.5), lengths.quantile(0.95)


def request_statuses(state: NodeState, now: float) -> list[RequestStatus]:
    """Every request that is not over, the most senior first."""
    places = {
        request.id: place
        for service in state.services.values()
        for place, request in enumerate(service.waiting.values(), 1)
    }
    requests = sorted(state.requests.values(), key=lambda request: request.order)
    return [_request(state, request, places.get(request.id, 0), now) for request in requests]


def _request(state: NodeState, request: Request, place: int, now: float) -> RequestStatus:
    running = request.life is Life.RUNNING
    return RequestStatus(
        request=request.id,
        service=request.service,
        state=request.life.value,
        device=request.replica.leader if request.replica is not None else None,
        age_seconds=max(0.0, now - request.arrived),
        prompt_tokens=request.prompt,
        output_tokens=len(request.tokens) - request.prompt,
        max_tokens=request.max_tokens,
        preemptions=request.epoch,
        place=place,
        reason="" if running else _why_waiting(state, request, place),
        tier=request.tier,
        cached_tokens=request.cached,
    )


def _why_waiting(state: NodeState, request: Request, place: int) -> str:
    """The first thing that has to change before the request can run."""
    service = state.services[request.service]
    resident = [replica for replica in service.replicas if replica.stage is Stage.RESIDENT]
    if not resident:
        return _why_absent(state, service)
    if place > 1:
        return f"{place - 1} requests of its service are before it"
    if request.deferred:
        return "it is batch work, and runs when others leave a gap"
    if all(_is_claimed(state, replica, request) for replica in resident):
        return "a senior request has claimed the device's memory"
    if request.epoch:
        return "it was preempted, and waits for memory"
    return "it waits for memory, or for its turn in a step"


def _is_claimed(state: NodeState, replica: Replica, request: Request) -> bool:
    claims = [device.claim for device in state.group(replica)]
    return any(claim is not None and claim.order < request.order for claim in claims)


def _why_absent(state: NodeState, service: Service) -> str:
    """Why a service whose requests wait is not resident yet."""
    words = {
        "probing": "its model is being examined",
        "reading": "its model is being read",
        "copying": "its model is being copied to a device",
        "draining": "its model is leaving its device",
    }
    if all(device.closed for device in state.devices.values()):
        return "all devices are drained"
    failed = f"its model could not be loaded ({service.trouble})" if service.trouble else ""
    return words.get(service_state(service)) or failed or "its model waits for room on a device"

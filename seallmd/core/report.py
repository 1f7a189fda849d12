"""Turns a node's state into its report (`core.status`).

Owns the wording of states. Must not change anything.
"""

from __future__ import annotations

from seallmd.core.residency import Residency
from seallmd.core.state import Device, Image, NodeState, Service
from seallmd.core.status import DeviceStatus, NodeStatus, ServiceStatus


def node_status(state: NodeState, residency: Residency, now: float) -> NodeStatus:
    """The report at `now`."""
    return NodeStatus(
        policy=state.settings.scheduler.policy,
        draining=state.draining,
        block_bytes=state.settings.block_bytes,
        devices=tuple(_device(state, device) for device in state.devices.values()),
        services=tuple(_service(state, residency, service, now) for service in state.services.values()),
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
        steps=device.steps,
    )


def _service(state: NodeState, residency: Residency, service: Service, now: float) -> ServiceStatus:
    shape = service.shape
    replica = service.replicas[0] if service.replicas else None
    fraction = None
    if service.progress is not None:
        _, done, total = service.progress
        fraction = done / total if total else 0.0
    blocks = {(r.device, block) for r in service.running for block in r.blocks}
    return ServiceStatus(
        name=service.name,
        model=service.settings.model,
        state=service_state(service),
        pinned=service.settings.pinned,
        device=replica.device if replica else None,
        stage=fraction,
        weights_bytes=shape.weights_bytes if shape else 0,
        kv_bytes=len(blocks) * state.settings.block_bytes,
        context=residency.context_limit(service) if shape else service.settings.context,
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
        devices=tuple(r.device for r in service.replicas),
        cost_error=service.profile.costs.error if service.profile else 0.0,
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

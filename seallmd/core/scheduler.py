"""Which replica of a device steps next.

Owns the policies; each is a pure choice among replicas that have work. Must not form steps (`batcher`) nor
move models (`residency`). The policy is chosen in `[scheduler] policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seallmd.core.state import Device, NodeState, Replica

Policy = Callable[[NodeState, Device, Sequence[Replica]], list[Replica]]


def round_robin(_state: NodeState, device: Device, ready: Sequence[Replica]) -> list[Replica]:
    """The services in turn, beginning after the one that stepped last."""
    names = [replica.service for replica in ready]
    split = names.index(device.last_served) + 1 if device.last_served in names else 0
    return [*ready[split:], *ready[:split]]


def fcfs(state: NodeState, _device: Device, ready: Sequence[Replica]) -> list[Replica]:
    """The service of the most senior request first, until that request is done."""

    def seniority(replica: Replica) -> int:
        service = state.services[replica.service]
        orders = [request.order for request in replica.running.values()]
        orders += list(service.waiting)[:1]
        return min(orders, default=state.orders)

    return sorted(ready, key=seniority)


POLICIES: dict[str, Policy] = {"round-robin": round_robin, "fcfs": fcfs}

"""`dedicated`, the baseline of those who do not share: each service has its own devices to itself.

Owns where a service may be, and who has to leave before it comes in. Must not move anything (`residency`).
Where there are fewer devices than services need, several are given the same device and take turns on it, as
behind a proxy that swaps processes: a newcomer waits until the one before has finished all that came earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from seallmd.core.service import Replica, Service
from seallmd.core.state import Device, NodeState

NAME = "dedicated"


def is_dedicated(state: NodeState) -> bool:
    """Whether this node runs the baseline."""
    return state.settings.policy.scheduler == NAME


def own_devices(state: NodeState, service: Service, ranks: int) -> list[Device]:
    """The devices that a service may come in on: dealt out in the order of configuration, round and round."""
    before = takewhile(lambda other: other is not service, state.services.values())
    first, devices = sum(other.ranks for other in before), list(state.devices.values())
    return [devices[(first + rank) % len(devices)] for rank in range(min(ranks, len(devices)))]


def in_the_way(place: Sequence[Device], service: Service) -> list[Replica]:
    """Who has to be gone before a dedicated service comes in: everybody else."""
    others = {id(r): r for device in place for name, r in device.replicas.items() if name != service.name}
    return list(others.values())

"""`dedicated`, the baseline of those who do not share: each service has one device to itself.

Owns where a service may be, and who has to leave before it comes in. Must not move anything (`residency`).
Where there are fewer devices than services, several are given the same device and take turns on it, as behind
a proxy that swaps processes: a newcomer waits until the one before has finished all that came earlier.
"""

from __future__ import annotations

from seallmd.core.settings import NodeSettings
from seallmd.core.state import Device, Replica, Service

NAME = "dedicated"


def allowed_device(settings: NodeSettings, index: int) -> int | None:
    """The one device that the service of this index in `settings.services` may come in on; None: any."""
    policy: str = settings.scheduler.policy
    return index % settings.devices if policy == NAME else None


def in_the_way(device: Device, service: Service) -> list[Replica]:
    """Who has to be gone from its device before a dedicated service comes in: everybody else."""
    return [replica for name, replica in device.replicas.items() if name != service.name]

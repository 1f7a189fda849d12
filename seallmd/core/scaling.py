"""When one replica of a service is not enough.

Owns the judgement alone; `residency` brings the replica in. A replica more is worth having when the service's
requests, spread over one device more, would get their steps faster by `replicate_gain`, as the learnt costs
predict, and when that has been so for `replicate_seconds`. It only ever takes memory and devices that are
idle, and leaves again as soon as anybody else wants them.
"""

from __future__ import annotations

from seallmd.core.lending import speedup
from seallmd.core.service import Service, Stage
from seallmd.core.state import Device, NodeState


def watch_pressure(state: NodeState, service: Service) -> None:
    """Note since when another replica would have paid; to be called after every event."""
    if not _would_pay(state, service):
        service.pressed_since = None
    elif service.pressed_since is None:
        service.pressed_since = state.now


def wants_replica(state: NodeState, service: Service) -> bool:
    """Whether another replica has paid for long enough."""
    since = service.pressed_since
    return since is not None and state.now >= since + state.settings.policy.replicate_seconds


def _would_pay(state: NodeState, service: Service) -> bool:
    replicas, limits = service.replicas, state.settings.policy
    if not replicas or (len(replicas) + 1) * service.ranks > len(state.devices):
        return False
    if service.evict_tickets or any(replica.stage is not Stage.RESIDENT for replica in replicas):
        return False
    requests = len(service.waiting) + sum(len(replica.running) for replica in replicas)
    profile = service.profile
    if requests <= len(replicas) or profile is None:
        return False
    costs, context = profile.costs, profile.prompt_tokens + profile.output_tokens / 2
    own, idle = state.settings.threads, sum(map(is_idle, state.devices.values()))
    at_hand = len(replicas) * service.ranks + idle

    def round_seconds(replicas: int) -> float:
        """One token for every request: what does not fit into one step takes several."""
        each = requests / replicas
        rows = min(each, limits.max_rows)
        seconds = costs.predict(rows, rows * context)
        threads = own * (at_hand // (replicas * service.ranks))
        return seconds / speedup(threads, own, seconds, costs.predict(0, 0)) * each / rows

    return round_seconds(len(replicas)) >= limits.replicate_gain * round_seconds(len(replicas) + 1)


def is_idle(device: Device) -> bool:
    """Whether a device is up, nothing runs on it, and nothing is on its way there."""
    return (
        device.arena is not None
        and not device.inflight
        and all(
            replica.stage is Stage.RESIDENT and not replica.running for replica in device.replicas.values()
        )
    )

"""How long requests wait from one token to the next, where they are and where they could be.

Owns this prediction, for those who spread a service's requests over devices (`scaling`, `migration`). A
device runs one step of each replica that has requests, in turn: a *round*, and each of its requests gains a
token by it. Must not decide anything, nor know which requests these are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seallmd.core.estimate import room_for
from seallmd.core.lending import speedup
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import Device, NodeState


class Part(NamedTuple):
    """Requests of a service that are on a group of devices, or might be."""

    service: Service
    devices: tuple[int, ...]
    requests: float


def part_of(service: Service, replica: Replica) -> Part:
    """Those that a replica runs, and its share of those that wait."""
    there = sum([other.stage is Stage.RESIDENT for other in service.replicas])
    waiting = len(service.waiting) / there if replica.stage is Stage.RESIDENT else 0.0
    return Part(service, replica.devices, len(replica.running) + waiting)


def parts_on(state: NodeState, devices: Iterable[Device]) -> dict[int, Part]:
    """What is on some devices, by the copy of each replica."""
    return {
        replica.copy: part_of(state.services[replica.service], replica)
        for device in devices
        for replica in device.replicas.values()
    }


def wait_seconds(state: NodeState, parts: Sequence[Part]) -> float:
    """From one token to the next, summed up over the requests of parts that are all on their devices."""
    whole: dict[int, float] = {}
    fixed: dict[int, float] = {}
    for service, devices, requests in parts:
        seconds, least = _step(state, service, requests) if requests else (0.0, 0.0)
        for index in devices:
            whole[index] = whole.get(index, 0.0) + seconds
            fixed[index] = fixed.get(index, 0.0) + least
    own = state.settings.threads
    if own:  # what others do not need is lent
        up = [device for device in state.devices.values() if device.arena is not None]
        elsewhere = sum(_is_busy(device) for device in up if device.index not in whole)
        busy = elsewhere + sum(seconds > 0 for seconds in whole.values())
        threads = own * (len(up) // max(1, busy))
        whole = {
            i: seconds and seconds / speedup(threads, own, seconds, fixed[i]) for i, seconds in whole.items()
        }
    return sum(requests * max(whole[index] for index in devices) for _, devices, requests in parts)


def _step(state: NodeState, service: Service, requests: float) -> tuple[float, float]:
    """Seconds until each request has gained a token, and of these what an empty step takes.

    What does not fit into one step, or into memory, takes several.
    """
    profile = service.profile
    assert profile is not None
    room = [room_for(state, replica, profile) for replica in service.replicas]
    most = max(1.0, min(state.settings.policy.max_rows, *room))
    rows = min(requests, most)
    context = profile.prompt_tokens + profile.output_tokens / 2
    steps = requests / rows
    return steps * profile.costs.predict(rows, rows * context), steps * profile.costs.predict(0, 0)


def _is_busy(device: Device) -> bool:
    return any(replica.running for replica in device.replicas.values())

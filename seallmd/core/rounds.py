"""How long requests wait from one token to the next, where they are and where they could be.

Owns this prediction, for those who spread a service's requests over devices (`scaling`, `migration`). A
device runs one step of each replica that has requests, in turn: a *round*, and each of its requests gains a
token by it. Must not decide anything, nor know which requests these are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from seallmd.core.estimate import room_for
from seallmd.core.lending import speedup, threads_among
from seallmd.core.profile import ServiceProfile
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import Device, NodeState


class Part(NamedTuple):
    """Requests of a service that are on a group of devices, or might be."""

    service: Service
    devices: tuple[int, ...]
    requests: float


class Rounds:
    """Predictions for one look at the node: nothing may change while it is used.

    What is asked for again and again is kept: looks are frequent, and there may be many services.
    """

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._most: dict[str, float] = {}
        self._steps: dict[tuple[str, float], tuple[float, float]] = {}

    def parts_on(self, devices: Iterable[Device]) -> dict[int, Part]:
        """What is on some devices, by the copy of each replica: what it runs, and its share of who waits."""
        services = self._state.services
        return {
            replica.copy: _part(services[replica.service], replica)
            for device in devices
            for replica in device.replicas.values()
        }

    def is_best(self, replica: Replica) -> bool:
        """Whether what a replica has to run cannot get its tokens faster anywhere: it is one request, alone.

        Never told where idle devices lend their threads.
        """
        state = self._state
        if state.settings.threads or len(replica.running) > 1:
            return False
        return not any(
            state.services[other.service].waiting or (other.running and other is not replica)
            for device in state.group(replica)
            for other in device.replicas.values()
        )

    def wait_seconds(self, parts: Iterable[Part]) -> float:
        """From one token to the next, summed up over the requests of parts that are all on their devices.

        Of a group that reaches beyond these devices, the others count as if they had nothing else to do.
        """
        parts, state = list(parts), self._state
        whole: dict[int, float] = {}
        fixed: dict[int, float] = {}
        for service, devices, requests in parts:
            seconds, least = self._step(service, requests) if requests else (0.0, 0.0)
            for index in devices:
                whole[index] = whole.get(index, 0.0) + seconds
                fixed[index] = fixed.get(index, 0.0) + least
        own = state.settings.threads
        if own:  # what others do not need is lent
            others = (device for device in state.devices.values() if device.index not in whole)
            busy = sum(map(_runs_any, others)) + sum(seconds > 0 for seconds in whole.values())
            threads = threads_among(state, busy)
            for index, seconds in whole.items():
                whole[index] = seconds and seconds / speedup(threads, own, seconds, fixed[index])
        return sum(requests * max(whole[index] for index in devices) for _, devices, requests in parts)

    def least_seconds(self, parts: Iterable[Part]) -> float:
        """The same if each request had a device to itself: no way to spread them can be better.

        0 where idle devices lend their threads: how many there would be depends on the way.
        """
        if self._state.settings.threads:
            return 0.0
        return sum(requests * self._step(service, 1.0)[0] for service, _, requests in parts if requests)

    def _step(self, service: Service, requests: float) -> tuple[float, float]:
        """Seconds until each request has gained a token, and of these what an empty step takes.

        What does not fit into one step, or into memory, takes several.
        """
        key = service.name, requests
        if (known := self._steps.get(key)) is not None:
            return known
        profile = service.profile
        assert profile is not None
        rows = requests if requests <= 1 else min(requests, self._most_rows(service, profile))
        context = profile.prompt_tokens + profile.output_tokens / 2
        steps = requests / rows
        seconds = steps * profile.costs.predict(rows, rows * context), steps * profile.costs.predict(0, 0)
        self._steps[key] = seconds
        return seconds

    def _most_rows(self, service: Service, profile: ServiceProfile) -> float:
        if service.name not in self._most:
            room = [room_for(self._state, replica, profile) for replica in service.replicas]
            self._most[service.name] = max(1.0, min(self._state.settings.policy.max_rows, *room))
        return self._most[service.name]


def _part(service: Service, replica: Replica) -> Part:
    waiting = 0.0
    if service.waiting and replica.stage is Stage.RESIDENT:
        waiting = len(service.waiting) / sum([r.stage is Stage.RESIDENT for r in service.replicas])
    return Part(service, replica.devices, len(replica.running) + waiting)


def _runs_any(device: Device) -> bool:
    return any(replica.running for replica in device.replicas.values())

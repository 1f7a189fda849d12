"""When one replica of a service is not enough.

Owns this judgement and its clock. Must not know how a service comes in (`residency`). A replica more is worth
having when the service's requests, spread over one device more, would get their steps faster by
`replicate_gain`, as the learnt costs and the room for their KV predict, and when that has been so for
`replicate_seconds`. It only ever takes memory and devices that are idle, and leaves again as soon as anybody
else wants them.
"""

from __future__ import annotations

from math import inf

from seallmd.core.estimate import room_for
from seallmd.core.images import Images
from seallmd.core.lending import speedup
from seallmd.core.places import Places, available
from seallmd.core.residency import Residency
from seallmd.core.service import Image, Service, Stage
from seallmd.core.state import Device, NodeState
from seallmd.core.wakeup import soonest


class Scaling:
    """Gives idle devices to services for which one more would pay, on the shared state."""

    def __init__(self, state: NodeState, places: Places, residency: Residency, images: Images) -> None:
        self._state = state
        self._places = places
        self._residency = residency
        self._images = images
        self._look_at = 0.0
        self._pressed: list[Service] = []  # at the last look

    def settle(self) -> None:
        """Look who is pressed, often enough to tell for how long a replica would have paid."""
        state, limits = self._state, self._state.settings.policy
        if not limits.replicate or state.now < self._look_at:
            return
        self._look_at = state.now + limits.replicate_seconds / 8
        if not (idle := self._idle_devices()):
            return
        for service in state.services.values():
            if not _would_pay(state, service, idle):
                service.pressed_since = None
                continue
            if service.pressed_since is None:
                service.pressed_since = state.now
            if state.now >= service.pressed_since + limits.replicate_seconds and self._replicate(service):
                idle = self._idle_devices()
        self._pressed = [s for s in state.services.values() if s.pressed_since is not None]

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return self._look_at if self._state.settings.policy.replicate else inf

    def next_wakeup(self) -> float:
        """When a service that is pressed will have been so for long enough; inf: none is."""
        if not self._pressed:
            return inf
        seconds = self._state.settings.policy.replicate_seconds
        times = [s.pressed_since + seconds for s in self._pressed if s.pressed_since is not None]
        return soonest(times, self._state.now)

    def _idle_devices(self) -> int:
        return sum(map(is_idle, self._state.devices.values()))

    def _replicate(self, service: Service) -> bool:
        """Bring a busy service in on idle devices too, taking nothing from anybody. Whether that is begun."""
        need = self._places.need(service)
        idle = [
            place
            for place in self._places.of(service)
            if available(place) >= need
            and all(
                service.name not in device.replicas
                and not self._state.strangers(device, service.name)
                and is_idle(device)
                and self._state.claim_on(device) is None
                for device in place
            )
        ]
        if not idle:
            return False
        if service.image is not Image.READY:
            self._images.want(service)
            return False
        if not self._residency.start(service, max(idle, key=available)):
            return False
        service.pressed_since = None
        return True


def _would_pay(state: NodeState, service: Service, idle: int) -> bool:
    """Whether another replica would, where so many devices are idle."""
    replicas, limits = service.replicas, state.settings.policy
    requests = len(service.waiting) + sum([len(replica.running) for replica in replicas])
    if requests <= len(replicas):
        return False  # as of most services
    profile = service.profile
    if profile is None or not replicas or (len(replicas) + 1) * service.ranks > len(state.devices):
        return False
    if service.evict_tickets or any(replica.stage is not Stage.RESIDENT for replica in replicas):
        return False
    costs, context = profile.costs, profile.prompt_tokens + profile.output_tokens / 2
    own, at_hand = state.settings.threads, len(replicas) * service.ranks + idle
    most = max(1.0, min(limits.max_rows, *(room_for(state, replica, profile) for replica in replicas)))

    def round_seconds(replicas: int) -> float:
        """One token for every request: what does not fit into one step, or memory, takes several."""
        each = requests / replicas
        rows = min(each, most)
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

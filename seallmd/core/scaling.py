"""When one replica of a service is not enough.

Owns this judgement and its clock. Must not know how a service comes in (`residency`). A replica more is worth
having when requests, spread over one device more, would get their tokens faster by `replicate_gain`, as
`rounds` predicts, and when that has been so for `replicate_seconds`. It only ever takes memory and devices
that are idle, and leaves again as soon as anybody else wants them; so a pinned service, which leaves for
nobody, never gets one.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from seallmd.core.images import Images
from seallmd.core.places import Places, available
from seallmd.core.residency import Residency
from seallmd.core.rounds import Part, Rounds
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
        idle = self._idle_devices()
        if not idle and not self._pressed:
            return
        rounds = Rounds(state)
        for service in state.services.values():
            if not _would_pay(state, rounds, service, idle):
                service.pressed_since = None
                continue
            if service.pressed_since is None:
                service.pressed_since = state.now
            if state.now >= service.pressed_since + limits.replicate_seconds and self._replicate(service):
                idle, rounds = self._idle_devices(), Rounds(state)
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

    def _idle_devices(self) -> list[Device]:
        return [device for device in self._state.devices.values() if is_idle(device)]

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


def _would_pay(state: NodeState, rounds: Rounds, service: Service, idle: list[Device]) -> bool:
    """Whether another replica would, on such devices."""
    replicas, limits = service.replicas, state.settings.policy
    if service.profile is None or not replicas or service.ranks > len(idle):
        return False
    if service.settings.pinned:
        return False  # nobody could push it out again: the device would not be idle, but taken
    if not service.waiting and not any(replica.running for replica in replicas):
        return False  # as of most services
    if service.evict_tickets or any(replica.stage is not Stage.RESIDENT for replica in replicas):
        return False
    if all(map(rounds.is_best, replicas)):
        return False
    parts = rounds.parts_on(state.devices_of(replicas))
    before = rounds.wait_seconds(parts.values())
    if before < limits.replicate_gain * rounds.least_seconds(parts.values()):
        return False
    place = tuple(device.index for device in idle if service.name not in device.replicas)[: service.ranks]
    if len(place) < service.ranks:
        return False
    after = min(rounds.wait_seconds(spread) for spread in _spreads(service, parts, place))
    return before >= limits.replicate_gain * after


def _spreads(service: Service, parts: dict[int, Part], place: tuple[int, ...]) -> Iterator[list[Part]]:
    """Ways to use another replica: an equal part of all requests, or all that one of the others has."""
    own = [replica.copy for replica in service.replicas]
    share = sum(parts[copy].requests for copy in own) / (len(own) + 1)
    yield [
        *(part._replace(requests=share) if copy in own else part for copy, part in parts.items()),
        Part(service, place, share),
    ]
    for taken in own:
        yield [
            *(part._replace(requests=0.0) if copy == taken else part for copy, part in parts.items()),
            Part(service, place, parts[taken].requests),
        ]


def is_idle(device: Device) -> bool:
    """Whether a device is up, nothing runs on it, and nothing is on its way there."""
    return (
        device.arena is not None
        and not device.inflight
        and all(
            replica.stage is Stage.RESIDENT and not replica.running for replica in device.replicas.values()
        )
    )

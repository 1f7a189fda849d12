"""A configuration that was read again: what still holds stays, what has changed changes.

Owns how services are added, changed and removed while others are served. A service whose model is another one
now ends what it has begun, leaves, and comes back as new. Must not know files (`seallmd.config`).
"""

from __future__ import annotations

from math import inf

import msgspec

from seallmd.core import events as ev
from seallmd.core.images import Images
from seallmd.core.room import Room
from seallmd.core.service import Image, Service, Stage
from seallmd.core.settings import ServiceSettings
from seallmd.core.sharing import Sharing
from seallmd.core.state import NodeState


class Reconfigure:
    """Carries changed settings out on the shared state."""

    def __init__(self, state: NodeState, room: Room, images: Images) -> None:
        self._state = state
        self._room = room
        self._images = images
        self._leaving: list[Service] = []
        self._breaks: dict[str, int] = {}  # of services that are gone: their cached prefixes may not be

    def apply(self, event: ev.Reconfigured) -> None:
        """Take over what the event says."""
        state = self._state
        before = {service.name: service for service in state.settings.services}
        wanted = {service.name: service for service in event.services}
        state.settings = msgspec.structs.replace(
            state.settings,
            services=event.services,
            groups=event.groups,
            policy=event.policy,
            replacement=event.replacement,
        )
        state.sharing = Sharing(event.groups)
        for name, service in state.services.items():
            service.changed()  # so has the policy
            if name not in wanted:
                self._retire(service, None)
            elif service.outgoing or before.get(name) != wanted[name]:
                self._change(service, wanted[name])
        for name, settings in wanted.items():
            if name not in state.services:
                self._add(settings)
        names = [*wanted, *(name for name in state.services if name not in wanted)]
        state.services = {name: state.services[name] for name in names}
        state.moved()
        self._part_strangers()

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return -inf if self._leaving else inf

    def settle(self) -> None:
        """Let services go that have left the configuration, once their last request has ended."""
        for service in list(self._leaving):
            if service.waiting or next(service.running, None) is not None:
                continue
            for replica in list(service.replicas):
                self._room.evict(replica, "it has left the configuration")
            if self._is_over(service):
                self._leaving.remove(service)
                self._remove(service)

    # ------------------------------------------------------------------------------- one service

    def _add(self, settings: ServiceSettings) -> None:
        service = Service(settings, wanted=settings.preload or settings.pinned)
        service.breaks = self._breaks.get(settings.name, 0)
        self._state.services[settings.name] = service
        self._state.note(settings.name, "added to the configuration")

    def _change(self, service: Service, settings: ServiceSettings) -> None:
        """The same model goes on with new rules; another one comes in under the name later."""
        if not _same_model(service.settings, settings):
            self._retire(service, settings)
            return
        stays = settings.preload or settings.pinned
        stayed = service.settings.preload or service.settings.pinned
        service.settings, service.successor = settings, None
        if service.outgoing:
            service.outgoing = False
            self._leaving.remove(service)
        if stays and not stayed and not service.replicas:
            service.wanted = True
        self._state.note(service.name, "configured anew")

    def _retire(self, service: Service, successor: ServiceSettings | None) -> None:
        """Take no more requests; leave when the last one has ended."""
        service.successor, service.wanted = successor, False
        if service.outgoing:
            return
        service.outgoing = True
        self._leaving.append(service)
        what = "removed from the configuration" if successor is None else "to be replaced by another model"
        self._state.note(service.name, what)
        self._state.answer(service.load_tickets, f"{service.name} is {what}")

    def _is_over(self, service: Service) -> bool:
        """Whether nothing that is on its way can concern the service any more."""
        told = self._state.examined == service.name or service.progress is not None
        examined = service.shape is not None or service.refused or not told
        steps = (step for device in self._state.devices.values() for step in device.inflight.values())
        return bool(
            examined
            and service.image is not Image.BUILDING
            and all(step.service != service.name for step in steps)
        )

    def _remove(self, service: Service) -> None:
        state, name = self._state, service.name
        if service.image is Image.READY:
            self._images.drop(service)
        for device in state.devices.values():
            if device.claim is not None and device.claim.service == name:
                device.claim = None
        profiles = {known: profile for known, profile in state.settings.profiles.items() if known != name}
        state.settings = msgspec.structs.replace(state.settings, profiles=profiles)
        state.planned = {known: groups for known, groups in state.planned.items() if known != name}
        self._breaks[name] = service.breaks + 1
        names = list(state.services)
        del state.services[name]
        state.note(name, "gone")
        if service.successor is not None:
            self._add(service.successor)
            state.services = {n: state.services[n] for n in names}
        state.moved()

    # ------------------------------------------------------------------------------- groups

    def _part_strangers(self) -> None:
        """Of services that may no longer be on one device, the one that came last leaves."""
        if not self._state.settings.groups:
            return
        for device in self._state.devices.values():
            stay: list[str] = []
            for replica in sorted(device.replicas.values(), key=lambda r: r.copy):
                if not any(self._state.sharing.apart(replica.service, other) for other in stay):
                    stay.append(replica.service)
                elif replica.stage is Stage.COPYING:
                    self._room.evict(replica, "it may no longer be beside another")
                else:
                    self._room.drain(replica, admit_below=0, seconds=None)


def _same_model(one: ServiceSettings, other: ServiceSettings) -> bool:
    """Whether both are the same model in the same form and place: then nothing has to be loaded again."""

    def form(settings: ServiceSettings) -> tuple[object, ...]:
        return settings.model, settings.dtype, settings.context, settings.tensor_parallel, settings.devices

    return form(one) == form(other)

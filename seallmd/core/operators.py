"""What operators ask for: loading, evicting, pinning, draining.

Owns the meaning of these events and when each of them is answered. Must not know how services move
(`residency`, `room`); a changed configuration is `reconfigure`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import msgspec

from seallmd.core import events as ev
from seallmd.core.places import Places
from seallmd.core.planner import Planner
from seallmd.core.room import Room
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import NodeState
from seallmd.core.tiers import END_OF_ORDERS


@dataclass(frozen=True, slots=True)
class _Drain:
    """A drain that somebody waits for: of a service, of a device, or of everything.

    Data alone, so that a node can be written down and read back.
    """

    ticket: int
    service: str = ""
    device: int | None = None

    def is_like(self, other: _Drain) -> bool:
        """Whether both are of the same."""
        return (self.service, self.device) == (other.service, other.device)


class Operators:
    """Carries operators' events out on the shared state."""

    def __init__(self, state: NodeState, places: Places, room: Room, planner: Planner) -> None:
        self._state = state
        self._room = room
        self._places = places
        self._planner = planner
        self._drains: list[_Drain] = []

    def handle(self, event: ev.OperatorEvent) -> None:
        """One event."""
        match event:
            case ev.LoadWanted():
                self._on_load(event)
            case ev.EvictWanted():
                self._on_evict(event)
            case ev.PinWanted():
                self._on_pin(event)
            case ev.ServiceDrainWanted():
                self._on_service_drain(event)
            case ev.DeviceDrainWanted():
                self._on_device_drain(event)
            case ev.NodeDrainWanted():
                self._on_node_drain(event)
            case ev.KeepWanted(name, seconds):
                if name in self._state.services:
                    self._state.services[name].keep_seconds = seconds

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return -inf if self._drains else inf

    def settle(self) -> None:
        """Answer the drains that are done."""
        for drain in list(self._drains):
            if self._is_done(drain):
                self._drains.remove(drain)
                self._state.answer([drain.ticket])

    def _is_done(self, drain: _Drain) -> bool:
        if drain.device is not None:
            return not self._state.devices[drain.device].replicas
        if drain.service:
            service = self._state.services.get(drain.service)
            return service is None or (not service.waiting and next(service.running, None) is None)
        return not self._state.requests

    def stop(self, *, now: bool) -> None:
        """The node is to end: no new requests; with `now`, those that it has fail."""
        state = self._state
        state.draining = state.stopping = True
        for request in list(state.requests.values()) if now else ():
            error = "the server is shutting down"
            state.finish(request, "failed", error, code="shutting_down", status=503, retry_after=5.0)

    def _named(self, name: str, ticket: int) -> Service | None:
        """A service by name; whoever asks for one that is not there is told."""
        service = self._state.services.get(name)
        if service is None or service.outgoing:
            self._state.answer([ticket], f"no service is called {name!r}")
            return None
        return service

    # ------------------------------------------------------------------------------- in and out

    def _on_load(self, event: ev.LoadWanted) -> None:
        state, service = self._state, self._named(event.service, event.ticket)
        if service is None:
            return
        if state.draining:
            state.answer([event.ticket], "the daemon is shutting down" if state.stopping else "it is drained")
        elif service.refused and (service.shape is not None or not state.host_up):
            state.answer([event.ticket], f"{service.name} cannot be served: {service.refused}")
        elif service.refused:  # what was wrong with the files or the network may have been mended
            service.refused = ""
            service.load_tickets.append(event.ticket)
        elif event.devices:
            self._planner.load(service, event.devices, event.ticket)
        elif any(replica.stage is Stage.RESIDENT for replica in service.replicas):
            state.answer([event.ticket])
        else:
            service.evicted = False
            service.retry_at = state.now  # an operator's word ends the pause after a failure
            service.load_tickets.append(event.ticket)

    def _on_evict(self, event: ev.EvictWanted) -> None:
        state, service = self._state, self._named(event.service, event.ticket)
        if service is None:
            return
        service.wanted, service.evicted = False, True
        state.answer(service.load_tickets, f"{service.name} was evicted before it was loaded")
        if event.now:
            for request in [*service.running, *service.waiting.values()]:
                error = f"model {service.name!r} was evicted by an operator"
                state.finish(request, "failed", error, code="model_evicted", status=503, retry_after=1.0)
        if not service.replicas:
            state.answer([event.ticket], "" if event.now else f"{service.name} is not loaded")
            return
        service.evict_tickets.append(event.ticket)
        for replica in list(service.replicas):
            if replica.stage is Stage.COPYING:
                self._room.evict(replica, "asked by an operator")
            else:
                # All who have come by now are served first, of every tier, and nobody who comes later.
                self._room.drain(replica, END_OF_ORDERS, seconds=None, admit_until=state.orders)

    # ------------------------------------------------------------------------------- pinning

    def _on_pin(self, event: ev.PinWanted) -> None:
        service = self._named(event.service, event.ticket)
        if service is None:
            return
        if event.pinned and (why := self._why_not_pinned(service)):
            self._state.answer([event.ticket], why)
            return
        service.settings = msgspec.structs.replace(service.settings, pinned=event.pinned)
        if event.pinned:
            service.evicted = False
            service.wanted = service.wanted or not service.replicas
            self.fail_misfits()
        elif service.replicas:
            service.wanted = False
        self._state.answer([event.ticket])

    def _why_not_pinned(self, service: Service) -> str:
        """A pin that cannot be kept is refused: memory is never promised twice."""
        if service.refused:
            return f"{service.name} cannot be served: {service.refused}"
        absent = service.shape is not None and not service.replicas
        if absent and self._places.of(service) and not self._places.able(service):
            return f"pinned services leave no room for {service.name} on any device"
        return ""

    def fail_misfits(self) -> None:
        """End waiting requests that fitted until something took a part of the memory for good."""
        for service in self._state.services.values():
            if not service.waiting or service.shape is None:
                continue
            limit = self._places.context_limit(service)
            for request in list(service.waiting.values()):
                if request.prompt + request.max_tokens > limit:
                    error = f"pinned services leave model {service.name!r} a context of {limit} tokens"
                    self._state.finish(request, "failed", error, code="context_length_exceeded", status=503)

    # ------------------------------------------------------------------------------- draining

    def _on_service_drain(self, event: ev.ServiceDrainWanted) -> None:
        service = self._named(event.service, event.ticket)
        if service is None:
            return
        service.closed = event.drained
        self._drain(_Drain(event.ticket, service=service.name), event.drained)

    def _on_device_drain(self, event: ev.DeviceDrainWanted) -> None:
        devices = self._state.devices
        if event.device not in devices:
            self._state.answer([event.ticket], f"there is no device {event.device}")
            return
        devices[event.device].closed = event.drained
        if event.drained:
            devices[event.device].claim = None
            self._send_away(event.device)
        self._drain(_Drain(event.ticket, device=event.device), event.drained)

    def _send_away(self, index: int) -> None:
        """Have everything leave a device: copies at once, the others when what they run has ended."""
        for replica in list(self._state.devices[index].replicas.values()):
            if replica.stage is Stage.COPYING:
                service = self._state.services[replica.service]
                self._room.evict(replica, "its device is being drained")
                # It was on its way in, and may go elsewhere.
                service.wanted = not service.replicas and not service.outgoing
            else:
                self._room.drain(replica, admit_below=0, seconds=None)
                self._stand_in_for(replica)

    def _stand_in_for(self, replica: Replica) -> None:
        """What it runs need not be waited for, where another replica can take it over."""
        service = self._state.services[replica.service]
        if replica.running and len(service.replicas) == 1 and self._state.settings.policy.migrate:
            self._planner.stand_in(service)

    def _on_node_drain(self, event: ev.NodeDrainWanted) -> None:
        state = self._state
        if state.stopping:
            state.answer([event.ticket], "the daemon is shutting down")
            return
        state.draining = event.drained
        self._drain(_Drain(event.ticket), event.drained)

    def _drain(self, drain: _Drain, drained: bool) -> None:
        """Keep a drain until it is done; taking one back is done at once, and ends those before it."""
        if drained:
            self._drains.append(drain)
            return
        for before in [before for before in self._drains if before.is_like(drain)]:
            self._drains.remove(before)
            self._state.answer([before.ticket], "it was undrained")
        self._state.answer([drain.ticket])

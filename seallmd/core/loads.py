"""How a load ends: well, in vain for now, or never.

Owns what is told to those who wait, and the pauses between tries. Must not know where services go
(`residency`).
"""

from __future__ import annotations

from seallmd.core.request import Life
from seallmd.core.room import Room
from seallmd.core.service import Replica, Service
from seallmd.core.state import Device, NodeState

MAX_RETRY_SECONDS = 60.0


class Loads:
    """The outcome of copies, images and probes, on the shared state."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._room = room

    def copied(self, replica: Replica, device: Device) -> None:
        """A device has its part of a service; with the last part it is resident."""
        replica.arrived.add(device.index)
        if len(replica.arrived) < len(replica.devices):
            return
        service = self._state.services[replica.service]
        replica.move("copied")
        replica.since = replica.used = self._state.now
        service.progress, service.trouble, service.failures, service.wanted = None, "", 0, False
        service.swaps_in += 1
        service.last_swap_seconds = self._state.now - replica.began
        service.swap_seconds += service.last_swap_seconds
        if all(index in service.former for index in replica.devices):
            service.return_seconds = service.last_swap_seconds
        self._state.note(service.name, f"resident on {replica.place} after {service.last_swap_seconds:.3f} s")
        self._state.answer(service.load_tickets)

    def copy_failed(self, replica: Replica, reason: str) -> None:
        """A copy came to nothing: its blocks are free again."""
        service = self._room.remove(replica, reason)
        if service.replicas:  # only the replica more came to nothing
            self._state.note(service.name, f"no replica on {replica.place}: {reason}")
            service.pressed_since = None
        else:
            self.failed(service, reason)

    def image_failed(self, service: Service, reason: str) -> None:
        """An image came to nothing. A service that is there serves on: only a replica more has to wait."""
        if not service.replicas:
            self.failed(service, reason)
            return
        service.image_retry_at, service.progress = self._state.now + self._next_pause(service), None
        self._state.note(service.name, f"no image for another replica: {reason}")

    def failed(self, service: Service, reason: str) -> None:
        """Tell all who wait, once; the next try is allowed after a pause that doubles."""
        pause = self._next_pause(service)
        service.trouble, service.retry_at = reason, self._state.now + pause
        service.wanted, service.progress = False, None
        self._give_up(service, f"model {service.name!r} could not be loaded: {reason}", pause)

    def _next_pause(self, service: Service) -> float:
        service.failures += 1
        return min(MAX_RETRY_SECONDS, 2.0 ** (service.failures - 1))

    def pause(self, service: Service, reason: str, seconds: float) -> None:
        """Tell all who wait that it cannot be served for so long; it comes back by itself."""
        service.trouble, service.retry_at = reason, self._state.now + seconds
        self._give_up(service, f"model {service.name!r} cannot be served: {reason}", seconds)

    def refuse(self, service: Service, reason: str) -> None:
        """The service can never be served here."""
        service.refused = reason
        service.wanted = False
        service.progress = None
        self._give_up(service, f"model {service.name!r} cannot be served: {reason}", 0.0)

    def _give_up(self, service: Service, error: str, retry_after: float) -> None:
        self._state.note(service.name, error)
        self._state.answer(service.load_tickets, error)
        for request in list(service.waiting.values()):
            assert request.life is Life.WAITING
            self._state.finish(
                request, "failed", error, code="model_unavailable", status=503, retry_after=retry_after
            )

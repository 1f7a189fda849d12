"""Makes room on a device: who may leave, who must, and in what order.

Owns eviction, draining and preemption for memory. Must not know why room is wanted: `residency` wants it for
weights, `batcher` for KV. Rules that hold always: a pinned service leaves only when an operator says so; a
service with work leaves for another only by draining, not before it has run a step since it came, and not
before it has been resident for `min_residency_seconds`.
"""

from __future__ import annotations

from collections.abc import Container

from seallmd.core.messages import DropWeights
from seallmd.core.request import Request
from seallmd.core.state import Device, NodeState, Replica, Service, Stage


class Room:
    """Frees memory on the shared state. evictions: how many there were; callers see whether any was."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self.evictions = 0

    def may_leave(self, replica: Replica) -> bool:
        """Whether a replica can be made to leave for another service."""
        service = self._state.services[replica.service]
        if service.settings.pinned or replica.stage is Stage.COPYING:
            return False
        # Never before it did what it was brought in for: two services in demand would only copy.
        settled = replica.served or not service.waiting
        stayed = self._state.now - replica.since >= self._state.settings.scheduler.min_residency_seconds
        return replica.stage is Stage.DRAINING or (settled and stayed)

    # ------------------------------------------------------------------------------- making room

    def idle(self, device: Device, keep: str) -> list[Replica]:
        """Replicas that may leave at once and have nothing to do; the longest unused first."""
        idle = [
            replica
            for name, replica in device.replicas.items()
            if name != keep and self.may_leave(replica) and not replica.running and self._spare(replica)
        ]
        return sorted(idle, key=lambda r: r.used)

    def _spare(self, replica: Replica) -> bool:
        """Whether nobody would miss a replica that runs nothing: no demand, or others that can meet it."""
        service = self._state.services[replica.service]
        others = any(r is not replica and r.stage is Stage.RESIDENT for r in service.replicas)
        return not service.demand or (others and not service.waiting)

    def evict_idle(self, device: Device, blocks: int, keep: str) -> bool:
        """Evict idle services until `blocks` are available; none when that would not do. True if any left."""
        arena, idle = device.arena, self.idle(device, keep)
        assert arena is not None
        if arena.available + sum(arena.weights_of(r.service) for r in idle) < blocks:
            return False
        evicted = False
        for replica in idle:
            if arena.available >= blocks:
                break
            self.evict(replica, "idle, its memory was wanted")
            evicted = True
        return evicted

    def make_room(self, device: Device, blocks: int, request: Request, kept: Container[int]) -> bool:
        """Free `blocks` for a request, cheapest means first; never from its seniors nor from rows in `kept`.

        1. evict idle services; 2. preempt the most junior running request of the device; 3. evict services
        that have waiting requests only. When nothing is left to take and the request is alone, it fails.
        """
        arena = device.arena
        assert arena is not None
        self.evict_idle(device, blocks, keep=request.service)
        while arena.available < blocks:
            junior = self._most_junior(device, request, kept)
            if junior is not None:
                self._state.preempt(junior, f"request {request.id} is senior and needs memory")
            elif not self._evict_unserved(device, keep=request.service):
                break
        if arena.available >= blocks:
            return True
        if not any(r.running.keys() - {request.id} for r in device.replicas.values()):
            copying = any(r.stage is Stage.COPYING for r in device.replicas.values())
            if not copying:
                self._state.finish(
                    request, "failed", "the device has no memory left for this request", status=503
                )
        return False

    def _most_junior(self, device: Device, request: Request, kept: Container[int]) -> Request | None:
        juniors = [
            other
            for replica in device.replicas.values()
            for other in replica.running.values()
            if other.order > request.order and other.id not in kept
        ]
        return max(juniors, key=lambda r: r.order, default=None)

    def _evict_unserved(self, device: Device, keep: str) -> bool:
        for name, replica in device.replicas.items():
            pinned = self._state.services[name].settings.pinned
            if name != keep and not pinned and not replica.running and replica.stage is not Stage.COPYING:
                self.evict(replica, "a senior request needed its memory")
                return True
        return False

    # ------------------------------------------------------------------------------- going out

    def drain(self, replica: Replica, admit_below: int, seconds: float | None) -> None:
        """Admit only seniors of `admit_below` from now on; after `seconds`, preempt what still runs."""
        if replica.stage is Stage.RESIDENT:
            replica.move("drain")
        replica.admit_below = admit_below
        replica.drain_until = None if seconds is None else self._state.now + seconds

    def settle_drains(self) -> None:
        """Evict what has drained; keep what nobody wants gone any more."""
        for service in self._state.services.values():
            for replica in list(service.replicas):
                if replica.stage is Stage.DRAINING:
                    self._settle(service, replica)

    def _settle(self, service: Service, replica: Replica) -> None:
        claims = [self._state.claim_on(device) for device in self._state.group(replica)]
        wanted_gone = service.evict_tickets or replica.leaving
        if not wanted_gone and not any(claim is not None and claim.load for claim in claims):
            replica.move("keep")
            self._state.answer(service.load_tickets)
            return
        if replica.drain_until is not None and self._state.now >= replica.drain_until:
            for request in list(replica.running.values()):
                self._state.preempt(request, "its service makes room for another")
        seniors = any(order < replica.admit_below for order in service.waiting)
        if not replica.running and not seniors:
            self.evict(replica, _why_gone(service, replica))

    def evict(self, replica: Replica, why: str) -> None:
        """Take a replica without running requests out of its arenas; their memory is free at once."""
        service = self.remove(replica)
        service.former.update(zip(replica.devices, replica.starts, strict=True))
        self.evictions += 1
        self._state.note(service.name, f"evicted from {replica.place}: {why}")
        if not service.replicas:
            self._state.answer(service.evict_tickets)

    def remove(self, replica: Replica) -> Service:
        """Take a replica that runs nothing off the books and out of its devices; returns the service."""
        assert not replica.running, f"{replica.service} still runs requests"
        service = self._state.services[replica.service]
        service.replicas.remove(replica)
        service.progress = None
        for device, arena in zip(self._state.group(replica), replica.ranks.arenas, strict=True):
            del device.replicas[service.name]
            if device.reserved is replica:
                device.reserved = None
            arena.free_weights(service.name)
            self._state.send(device.index, DropWeights(service.name))
        return service

    def _distrust_kv(self, service: Service) -> None:
        """Rank 0 may have reported a step that another rank never finished: what it wrote there is not KV."""
        service.breaks += 1
        for request in service.waiting.values():
            self._state.drop_saved(request)

    def break_up(self, replica: Replica) -> None:
        """A replica that cannot go on: its requests start over, and it comes in again if it may."""
        for request in list(replica.running.values()):
            self._state.restart(request)
        service = self.remove(replica)
        if len(replica.devices) > 1:
            self._distrust_kv(service)
        if not service.replicas:
            service.wanted = not service.evict_tickets
            self._state.answer(service.evict_tickets)


def _why_gone(service: Service, replica: Replica) -> str:
    if service.evict_tickets:
        return "asked by an operator"
    return "by plan" if replica.leaving else "another service waits"

"""Makes room on a device: who may leave, who must, and in what order.

Owns eviction, draining and preemption for memory. Must not know why room is wanted: `residency` wants it for
weights, `batcher` for KV. Rules that hold always: a pinned service leaves only when an operator says so, or
for a larger device when a request of its own needs that (`outgrown`); a service with work leaves for another
only by draining, not before it has run a step since it came, and not before it has been resident for so long
that bringing it in was worth it (`worth.stays_until`).
"""

from __future__ import annotations

from collections.abc import Container
from math import inf

from seallmd.core.messages import DropWeights
from seallmd.core.request import Life, Request
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import Device, NodeState
from seallmd.core.tiers import yields
from seallmd.core.wakeup import soonest
from seallmd.core.worth import stays_until


def missed(state: NodeState, replica: Replica) -> tuple[float, float]:
    """By how much an idle replica would be missed: importance goes before when it was used last."""
    return state.services[replica.service].settings.importance, replica.used


class Room:
    """Frees memory on the shared state."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._draining: dict[int, Replica] = {}  # by copy

    def may_leave(self, replica: Replica) -> bool:
        """Whether a replica can be made to leave for another service."""
        service = self._state.services[replica.service]
        if service.settings.pinned or replica.stage is Stage.COPYING:
            return False
        # Never before it did what it was brought in for: two services in demand would only copy.
        settled = replica.served or not service.waiting
        stayed = self._state.now >= stays_until(self._state, replica)
        return replica.stage is Stage.DRAINING or (settled and stayed)

    # ------------------------------------------------------------------------------- making room

    def idle(self, device: Device, keep: str) -> list[Replica]:
        """Replicas that may leave at once and have nothing to do; the least missed first."""
        idle = [
            replica
            for name, replica in device.replicas.items()
            if name != keep and self.may_leave(replica) and not replica.running and self._spare(replica)
        ]
        return sorted(idle, key=lambda r: missed(self._state, r))

    def _spare(self, replica: Replica) -> bool:
        """Whether nobody would miss a replica that runs nothing: no demand, or others that can meet it."""
        service = self._state.services[replica.service]
        return not service.demand or (bool(service.others(replica)) and not service.waiting)

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
        """Free `blocks` for a request, cheapest means first.

        1. evict idle services; 2. evict replicas whose service is elsewhere too; 3. preempt the most junior
        running request of the device, never its seniors nor rows in `kept`; 4. evict services that have
        waiting requests only. When nothing is left to take and the request is alone, it has outgrown the
        device, and waits for its service to move (`outgrown`).
        """
        arena = device.arena
        assert arena is not None
        self.evict_idle(device, blocks, keep=request.service)
        while arena.available < blocks:
            if self._evict_spare(device, request):
                continue
            junior = self._most_junior(device, request, kept)
            if junior is not None:
                self._state.preempt(junior, f"request {request.id} is senior and needs memory")
            elif not self._evict_unserved(device, keep=request.service):
                break
        if arena.available >= blocks:
            return True
        if not any(r.running.keys() - {request.id} for r in device.replicas.values()):
            copying = any(r.stage is Stage.COPYING for r in device.replicas.values())
            if not copying and request.life is Life.RUNNING:
                self._state.preempt(request, "it has outgrown its device")
                self._state.stranded.add(request.service)
        return False

    def displace(self, device: Device, blocks: int, request: Request, kept: Container[int]) -> None:
        """Preempt running requests that yield to a more urgent one, most junior first; never those `kept`."""
        arena = device.arena
        assert arena is not None
        while arena.available < blocks:
            junior = self._most_junior(device, request, kept)
            if junior is None or not yields(junior.tier, request.tier):
                return
            self._state.preempt(junior, f"request {request.id} is more urgent and needs memory")

    def _evict_spare(self, device: Device, request: Request) -> bool:
        """Evict the replica with least to do of a service that has another one; its requests go on there.

        Only one whose weights free more than the KV that it takes with it, and never the one that the request
        runs on, or is about to.
        """
        found: list[tuple[int, Replica]] = []
        for replica in device.replicas.values():
            own = replica.service == request.service
            if own or not self._has_stand_in(replica) or not self.may_leave(replica):
                continue
            kv = sum(len(other.tables[0]) for other in replica.running.values())
            if kv < sum(self._state.services[replica.service].segment_blocks):
                found.append((kv, replica))
        if not found:
            return False
        _, replica = min(found, key=lambda pair: pair[0])
        for other in list(replica.running.values()):
            self._state.preempt(other, "its replica makes room for others' KV")
        self.evict(replica, "its service is elsewhere too, and memory is short")
        return True

    def _has_stand_in(self, replica: Replica) -> bool:
        """Whether another replica of its service is there to take all that it runs."""
        state = self._state
        least = state.most_kv_blocks_of(replica)
        others = state.services[replica.service].others(replica)
        return any(state.most_kv_blocks_of(other) >= least for other in others)

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

    def drain(
        self, replica: Replica, admit_below: int, seconds: float | None, admit_until: int | None = None
    ) -> None:
        """Admit only seniors of `admit_below` from now on; after `seconds`, preempt what still runs.

        admit_until: and of them only those that had arrived by then.
        """
        if replica.stage is Stage.RESIDENT:
            replica.move("drain")
            self._draining[replica.copy] = replica
        replica.admit_below, replica.admit_until = admit_below, admit_until
        replica.drain_until = None if seconds is None else self._state.now + seconds

    def settle(self) -> None:
        """Evict what has drained; keep what nobody wants gone any more."""
        if not self._draining:
            return
        for replica in list(self._draining.values()):
            if replica.copy in self._draining:
                self._settle_one(self._state.services[replica.service], replica)

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return -inf if self._draining else inf

    def next_wakeup(self) -> float:
        """When what still runs on a draining replica is to be preempted; inf: never."""
        if not self._draining:
            return inf
        times = [r.drain_until for r in self._draining.values() if r.drain_until is not None]
        return soonest(times, self._state.now)

    def _settle_one(self, service: Service, replica: Replica) -> None:
        claims = [self._state.claim_on(device) for device in self._state.group(replica)]
        if not self._unwanted(service, replica) and not any(
            claim is not None and claim.load for claim in claims
        ):
            replica.move("keep")
            self._state.moves += 1  # it admits again
            del self._draining[replica.copy]
            self._state.answer(service.load_tickets)
            return
        self._move_on(service, replica)
        if replica.drain_until is not None and self._state.now >= replica.drain_until:
            for request in list(replica.running.values()):
                self._state.preempt(request, "its service makes room for another")
        if not replica.running and not any(map(replica.lets_in, service.waiting)):
            self.evict(replica, self._why_gone(service, replica))

    def _move_on(self, service: Service, replica: Replica) -> None:
        """Have what runs on a draining replica go on in others of its service, as far as these have room."""
        others = service.others(replica)
        if not others or not self._state.settings.policy.migrate:
            return
        for request in list(replica.running.values()):
            roomiest = max(others, key=lambda r: r.ranks.available)
            if self._state.has_room(roomiest, [request]):
                self._state.migrate(request, roomiest, "its replica is to leave")

    def _unwanted(self, service: Service, replica: Replica) -> bool:
        """Whether somebody wants a draining replica gone, whoever comes after it."""
        return bool(
            service.evict_tickets
            or replica.leaving
            or any(
                device.closed or self._state.strangers(device, service.name)
                for device in self._state.group(replica)
            )
        )

    def _why_gone(self, service: Service, replica: Replica) -> str:
        if service.evict_tickets:
            return "asked by an operator"
        if any(device.closed for device in self._state.group(replica)):
            return "its device is being drained"
        return "by plan" if replica.leaving else "another service waits"

    def evict(self, replica: Replica, why: str) -> None:
        """Take a replica without running requests out of its arenas; their memory is free at once."""
        service = self.remove(replica, why)
        service.former.update(zip(replica.devices, replica.starts, strict=True))
        self._state.note(service.name, f"evicted from {replica.place}: {why}")
        if not service.replicas:
            self._state.answer(service.evict_tickets)

    def remove(self, replica: Replica, why: str) -> Service:
        """Take a replica that runs nothing off the books and out of its devices; returns the service."""
        assert not replica.running, f"{replica.service} still runs requests"
        service = self._state.services[replica.service]
        self._state.exit(replica)
        self._draining.pop(replica.copy, None)
        service.progress = None
        service.left_at = self._state.now
        for device, arena in zip(self._state.group(replica), replica.ranks.arenas, strict=True):
            if device.reserved is replica:
                device.reserved = None
            arena.free_weights(service.name)
            self._state.send(device.index, DropWeights(service.name))
        if replica.stage is Stage.COPYING and service.replicas:  # absent, it would be brought in again
            self._state.answer(service.load_tickets, f"{service.name} did not come to {replica.place}: {why}")
        return service

    def distrust_kv(self, service: Service) -> None:
        """Rank 0 may have reported a step that another rank never finished: what it wrote there is not KV."""
        service.breaks += 1
        for request in service.waiting.values():
            self._state.drop_saved(request)
        for request in [r for r in service.running if r.landing]:
            self._state.restart(request)

    def break_up(self, replica: Replica) -> None:
        """A replica that cannot go on: its requests start over, and it comes in again if it may."""
        for request in list(replica.running.values()):
            if request.landing:  # its KV has not left host memory
                self._state.preempt(request, "where it was to go on is lost")
            else:
                self._state.restart(request)
        service = self.remove(replica, "its device was lost")
        if len(replica.devices) > 1:
            self.distrust_kv(service)
        if not service.replicas:
            service.wanted = not service.evict_tickets and not service.outgoing
            self._state.answer(service.evict_tickets)

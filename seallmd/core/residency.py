"""Which services come into which arenas.

Owns placing and the number of ranks. Must not form steps, nor know how room is made (`room`), how a load
ends (`loads`) or why a service is wanted beyond the requests and tickets it has. All waiters of one model
share one swap; busy services are asked to make room when that is worth it (`worth`).
"""

from __future__ import annotations

from math import inf

from seallmd.core import dedicated
from seallmd.core.copying import copy_in
from seallmd.core.cost import StepCosts
from seallmd.core.images import Images
from seallmd.core.loads import Loads
from seallmd.core.messages import MoveBlocks
from seallmd.core.places import Place, Places, available
from seallmd.core.ranks import Ranks
from seallmd.core.room import Room, missed
from seallmd.core.service import Image, Replica, Service, Stage
from seallmd.core.splitting import worthwhile_ranks
from seallmd.core.state import Claim, Device, NodeState
from seallmd.core.tiers import is_deferred
from seallmd.core.wakeup import soonest
from seallmd.core.worth import asks_at, drain_seconds, loss, stays_until


class Residency:
    """Moves services in and out on the shared state."""

    def __init__(self, state: NodeState, places: Places, room: Room, images: Images, loads: Loads) -> None:
        self._state = state
        self._places = places
        self._loads = loads
        self._room = room
        self._images = images

    def look_at_sizes(self) -> None:
        """Choose each service's ranks, and refuse what no place can ever hold.

        To be called when a device or a model became known; nothing is judged before all devices are.
        """
        if any(device.arena is None for device in self._state.devices.values()):
            return
        for service in self._state.services.values():
            if service.shape is not None and not service.refused and not service.replicas:
                self._choose_ranks(service)

    def _choose_ranks(self, service: Service) -> None:
        """As many as configured, or as few as it takes; the first reason for refusal is the best one."""
        assert service.shape is not None
        wanted = service.settings.tensor_parallel
        reason = ""
        choices = (wanted,) if wanted else (1, *(shard.ranks for shard in service.shape.shards))
        if service.waiting:  # these were admitted by the room that so many ranks have
            choices = (service.ranks, *choices)
        for ranks in choices:
            misfit = self._places.misfit(service, ranks)
            if not misfit:
                if not wanted and not service.waiting and not dedicated.is_dedicated(self._state):
                    self._split_further(service)
                self._guess_costs(service)
                self._look_at_image(service)
                return
            reason = reason or misfit
        self._loads.refuse(service, reason)

    def _split_further(self, service: Service) -> None:
        """Over more devices than it needs, where there are enough and as far as that is worth it."""
        assert service.shape is not None
        settings, fewest = self._state.settings, service.ranks
        if len(self._state.services) > settings.devices:
            return
        efficiency = settings.policy.split_efficiency
        for ranks in worthwhile_ranks(service.shape, settings.roofline, fewest, efficiency):
            if not self._places.misfit(service, ranks):
                return
        service.split_over(fewest, settings)

    def _guess_costs(self, service: Service) -> None:
        """Expect of its ranks what the roofline says, until steps teach better."""
        if service.profile is not None and service.shape is not None and not service.profile.costs.steps:
            roofline = self._state.settings.roofline
            service.profile.costs = StepCosts.guess(roofline, service.shape, service.ranks)

    # ------------------------------------------------------------------------------- bringing in

    def settle(self) -> None:
        """Start what is wanted and can be started; ask for room where somebody has waited long enough."""
        wanted = [service for service in self._state.absent if self._is_wanted(service)]
        if not wanted:
            return  # as after most events
        for service in sorted(wanted, key=self._order):
            if service.image is not Image.READY:
                self._images.want(service)
            else:
                self._bring_in(service)

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`. One that is only to be there (`preload`) takes memory when somebody looks."""
        asked_for = any(service.waiting or service.load_tickets for service in self._asked_for())
        return -inf if asked_for else inf

    def _asked_for(self) -> list[Service]:
        return [service for service in self._state.absent if service.demand and not service.refused]

    def next_wakeup(self) -> float:
        """When something may change for services that are absent and asked for; inf: never."""
        state, asked_for = self._state, self._asked_for()
        if not asked_for:
            return inf
        times = [stays_until(state, r) for device in state.devices.values() for r in device.replicas.values()]
        for service in asked_for:
            times += (service.retry_at, service.asks_at)
        return soonest(times, state.now)

    def _is_wanted(self, service: Service) -> bool:
        return (
            service.demand
            and not service.refused
            and service.shape is not None
            and self._state.now >= service.retry_at
        )

    def _order(self, service: Service) -> int:
        """Seniority of what the service is wanted for."""
        return next(iter(service.waiting), self._state.orders)

    def _bring_in(self, service: Service) -> None:
        if dedicated.is_dedicated(self._state):
            self._take_turn(service)
            return
        need, able = self._places.need(service), self._places.best(service)
        free = [place for place in able if not any(self._promised(device, service) for device in place)]
        # Where it fits as things are; where only idle services must leave, the least missed first.
        # Fewest neighbours first: compute is what services share, and a larger device has no more of it.
        # Where the plan has it goes before all.
        planned = self._state.planned.get(service.name, ())

        def order(place: Place) -> tuple[bool, int, int]:
            neighbours = sum(len(device.replicas) for device in place)
            return tuple(d.index for d in place) not in planned, neighbours, -available(place)

        for place in sorted(free, key=order):
            if available(place) >= need and self.start(service, place):
                return
        if not service.waiting and not service.load_tickets:
            return  # nobody asks for it now: it takes room, but nobody's
        for place in sorted(free, key=lambda p: max(map(self._missed, p))):
            if self._evict_idle_for(service, place, need) and self.start(service, place):
                return
        if self._state.now >= service.asks_at or service.load_tickets:
            self._ask_for_room(service, need, able)

    def _take_turn(self, service: Service) -> None:
        """Come in on the devices that a dedicated service may have, once those there have finished."""
        for place in self._places.of(service):
            if any(self._loads_another(device, service) for device in place):
                return
            others = dedicated.in_the_way(place, service)
            if not others and self.start(service, place):
                return
            if not service.waiting and not service.load_tickets:
                return  # nobody asks for it now: the others stay
            for device in place:
                device.claim = Claim(self._order(service), service.name, load=True)
            for replica in others:
                if replica.stage is Stage.RESIDENT:
                    self._room.drain(replica, admit_below=self._order(service), seconds=None)
                else:  # leaving already: its seniors would wait for ever behind this claim
                    replica.admit_below = min(replica.admit_below, self._order(service))

    def _evict_idle_for(self, service: Service, place: Place, need: int) -> bool:
        """Evict as few idle services as let this one in, the least missed first. False if all would not."""
        leaving = [self._idle_in_the_way(service, device, need) for device in place]
        if any(replicas is None for replicas in leaving):
            return False
        gone: set[int] = set()  # one on several of these devices leaves once
        for replica in (replica for replicas in leaving for replica in replicas or ()):
            if replica.copy not in gone:
                gone.add(replica.copy)
                self._room.evict(replica, "idle, its memory was wanted")
        return bool(gone)

    def _idle_in_the_way(self, service: Service, device: Device, need: int) -> list[Replica] | None:
        """The fewest idle replicas whose leaving lets a service into a device; None if all would not do."""
        arena, idle = device.arena, self._room.idle(device, keep=service.name)
        assert arena is not None
        strangers = self._state.strangers(device, service.name)
        if not all(replica in idle for replica in strangers):
            return None
        idle.sort(key=lambda r: r not in strangers)  # these leave in any case
        for count in range(len(strangers), len(idle) + 1):
            names = [replica.service for replica in idle[:count]]
            blocks = arena.available + sum(map(arena.weights_of, names))
            if blocks >= need and arena.fits(service.segment_blocks, names, kv_stays=True):
                return idle[:count]
        return None

    def _missed(self, device: Device) -> tuple[float, float]:
        """Importance and last use of the idle service of the device that would be missed most."""
        idle = self._room.idle(device, keep="")
        return missed(self._state, idle[-1]) if idle else (inf, inf)

    def _ask_for_room(self, service: Service, need: int, able: list[Place]) -> None:
        """Claim a place's memory once it is worth it: nobody junior is admitted there, busy services drain.

        The claim replaces that of a request of a resident service.
        """
        if not able:
            if all(device.state == "up" for device in self._state.devices.values()):
                self._cannot(service)
            return
        free = [
            place
            for place in able
            if not any(self._loads_another(device, service) for device in place)
            and all(self._clearable(device, service, need) for device in place)
        ]
        if not free:
            settled = all(self._is_settled(device, service) for place in able for device in place)
            if settled and not self._state.awaits_devices:
                self._cannot(service)  # all is free that ever will be, and yet no run is long enough
            return  # else who is there has come but now; `next_wakeup` says when that changes
        costs = {place[0].index: self._asking_costs(place, service, need) for place in free}
        place = min(free, key=lambda p: costs[p[0].index])
        not_asked, lost, _ = costs[place[0].index]
        service.asks_at = asks_at(self._state, service, lost) if not_asked else self._state.now
        if service.asks_at > self._state.now:
            return
        for device in place:
            device.claim = Claim(self._order(service), service.name, load=True)
        for device in place:
            if service.demand:  # else it was given up on the device before
                self._drain_enough(device, service, need)
        if service.demand and available(place) >= need:
            self.start(service, place)  # room that was promised to somebody who goes behind

    def _movable(self, device: Device, service: Service) -> list[Replica]:
        """Replicas that can be made to leave, those that are leaving first, then the least missed."""

        def order(replica: Replica) -> tuple[bool, float, float]:
            staying = replica.stage is not Stage.DRAINING
            return staying, loss(self._state, replica, service), replica.since

        return sorted(filter(self._room.may_leave, device.replicas.values()), key=order)

    def _is_settled(self, device: Device, service: Service) -> bool:
        """Whether only those are on a device that stay for good, and no other service comes in before.

        What they run and wait for does not matter: `_clearable` counts on its end.
        """
        stay = all(
            self._state.services[name].settings.pinned and replica.stage is not Stage.DRAINING
            for name, replica in device.replicas.items()
        )
        return stay and not self._loads_another(device, service)

    def _clearable(self, device: Device, service: Service, need: int) -> bool:
        """Whether a device has room once all that can leave has left and all that runs has ended."""
        assert device.arena is not None
        movable = [replica for replica in device.replicas.values() if self._room.may_leave(replica)]
        if any(replica not in movable for replica in self._state.strangers(device, service.name)):
            return False
        leaving = [replica.service for replica in movable]
        freed = sum(device.arena.weights_of(name) for name in leaving)
        enough = device.arena.available + device.arena.kv + freed >= need
        return enough and device.arena.fits(service.segment_blocks, leaving, kv_stays=False)

    def _asking_costs(self, place: Place, service: Service, need: int) -> tuple[bool, float, int]:
        """What speaks against a place: that another was asked before, and what those who leave lose."""
        asked = all(d.claim is not None and d.claim.service == service.name for d in place)
        leaving = {r.copy: r for device in place for r in self._leavers(device, service, need)}
        lost = sum(loss(self._state, replica, service) for replica in leaving.values())
        return not asked, lost, place[0].index

    def _leavers(self, device: Device, service: Service, need: int) -> list[Replica]:
        """Who has to leave a device for a service: whom it may not be beside, then the least missed first."""
        arena, leaving = device.arena, list[Replica]()
        assert arena is not None
        coming, strangers = arena.available, self._state.strangers(device, service.name)
        for replica in sorted(self._movable(device, service), key=lambda r: r not in strangers):
            names = [other.service for other in leaving]
            enough = coming >= need and arena.fits(service.segment_blocks, names, kv_stays=False)
            if enough and replica not in strangers:
                break
            leaving.append(replica)
            coming += arena.weights_of(replica.service) + len(_kv_blocks(replica, device))
        return leaving

    def _drain_enough(self, device: Device, service: Service, need: int) -> None:
        arena, leaving = device.arena, self._leavers(device, service, need)
        assert arena is not None
        for replica in leaving:
            if replica.drain_until is None or replica.stage is Stage.RESIDENT:
                # One that an operator lets finish has no deadline, but only while nobody waits for it to go.
                seconds = drain_seconds(self._state, service, replica)
                self._room.drain(replica, admit_below=0, seconds=seconds)
            replica.admit_below = 0  # its seniors would wait for ever behind the claim

    def _promised(self, device: Device, service: Service) -> bool:
        """Whether the device's memory is somebody else's before it can be the service's."""
        return self._loads_another(device, service) or self._state.claimed(device, self._order(service))

    def _loads_another(self, device: Device, service: Service) -> bool:
        """Whether the device is being cleared for another service; if for batch work alone, that can wait."""
        claim = self._state.claim_on(device)
        if claim is None or not claim.load or claim.service == service.name:
            return False
        return not is_deferred(claim.order) or is_deferred(self._order(service))

    def _cannot(self, service: Service) -> None:
        drained = not self._places.of(service) and self._places.of(service, closed=True)
        reason = "pinned services leave no room for it on any device"
        self._loads.failed(service, "an operator has drained its devices" if drained else reason)

    def bring(self, service: Service, place: Place) -> bool:
        """Start a replica at a place of the caller's choice, if only idle services have to leave for it."""
        if any(self._promised(device, service) for device in place):
            return False
        if available(place) >= self._places.need(service) and self.start(service, place):
            return True
        return self._evict_idle_for(service, place, self._places.need(service)) and self.start(service, place)

    def set_ranks(self, service: Service, ranks: int) -> None:
        """Have an absent service come in on so many devices; its host image is built anew."""
        assert service.profile is not None
        assert service.shape is not None
        service.split_over(ranks, self._state.settings)
        service.former.clear()
        service.profile.costs = StepCosts.guess(self._state.settings.roofline, service.shape, ranks)
        self._look_at_image(service)

    def _look_at_image(self, service: Service) -> None:
        """An image for another number of ranks is of no use; one that is being built is looked at later."""
        if service.image is Image.READY and service.image_ranks != service.ranks:
            self._images.drop(service)

    def start(self, service: Service, place: Place) -> bool:
        """Take the blocks and send the weights on their way. False when no run of blocks is long enough, or
        somebody is there that it may not be beside."""
        if any(self._state.strangers(device, service.name) for device in place):
            return False
        starts = self._take_runs(service, place)
        if starts is None:
            return False
        state = self._state
        state.copies += 1
        indexes = tuple(device.index for device in place)
        ranks = Ranks([device.arena for device in place if device.arena is not None])
        replica = Replica(service.name, indexes, ranks, starts, state.copies, state.now)
        state.enter(replica)
        service.image_used = state.now
        for rank, device in enumerate(place):
            if device.claim is not None and device.claim.service == service.name:
                device.claim = None
            state.send(device.index, copy_in(service, replica, rank, state.settings.block_bytes))
        state.note(service.name, f"copying to {replica.place}")
        return True

    def _take_runs(self, service: Service, place: Place) -> tuple[tuple[int, ...], ...] | None:
        """First blocks of the weights' segments on each device; None when one has no place for them."""
        starts: list[tuple[int, ...]] = []
        for device in place:
            assert device.arena is not None
            former = service.former.get(device.index)
            placement = device.arena.place(service.name, service.segment_blocks, former)
            if placement is None:
                for taken, _ in zip(place, starts, strict=False):
                    assert taken.arena is not None
                    taken.arena.free_weights(service.name)
                return None
            self._move_kv(device, placement.moves)
            starts.append(placement.starts)
        return tuple(starts)

    def _move_kv(self, device: Device, moves: tuple[tuple[int, int], ...]) -> None:
        if not moves:
            return
        renamed = dict(moves)
        for replica in device.replicas.values():
            rank = replica.devices.index(device.index)
            for request in replica.running.values():
                table = request.tables[rank]
                table[:] = [renamed.get(block, block) for block in table]
        self._state.send(device.index, MoveBlocks(tuple(renamed), tuple(renamed.values())))


def _kv_blocks(replica: Replica, device: Device) -> set[int]:
    """Blocks of a device that hold KV of a replica's requests."""
    rank = replica.devices.index(device.index)
    return {block for request in replica.running.values() for block in request.tables[rank]}

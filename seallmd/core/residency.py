"""Which services come into which arenas.

Owns placing, the number of ranks, and the outcome of copies. Must not form steps, nor know how room is made
(`room`) or why a service is wanted beyond the requests and tickets it has. All waiters of one model share one
swap; a busy service is asked to make room only after somebody has waited `patience_seconds` for it.

A place is a group of devices, in rank order; for most services a group of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seallmd.core import dedicated
from seallmd.core.cost import StepCosts
from seallmd.core.images import Images
from seallmd.core.messages import CopyIn, Extent, Group, MoveBlocks
from seallmd.core.ranks import Ranks
from seallmd.core.request import Life
from seallmd.core.room import Room
from seallmd.core.scaling import is_idle, wants_replica, watch_pressure
from seallmd.core.state import Claim, Device, Image, NodeState, Replica, Service, Stage

MAX_RETRY_SECONDS = 60.0

Place = Sequence[Device]


class Residency:
    """Moves services in and out on the shared state."""

    def __init__(self, state: NodeState, room: Room, images: Images) -> None:
        self._state = state
        self._room = room
        self._images = images
        self._look_at = 0.0

    # ------------------------------------------------------------------------------- what could fit

    def places(self, service: Service, ranks: int = 0) -> list[Place]:
        """Groups of running devices that a service may come in on: those configured, else neighbours.

        Neighbours alone, because neighbouring indexes are what machines connect best, and because all the
        combinations of 32 devices are too many.
        """
        ranks, devices = ranks or service.ranks, self._state.devices
        if dedicated.is_dedicated(self._state):
            groups = [dedicated.own_devices(self._state, service, ranks)]
        else:
            wanted: Iterable[Sequence[int]] = service.settings.devices or (
                range(first, first + ranks) for first in range(len(devices) - ranks + 1)
            )
            groups = [[devices[index] for index in group if index in devices] for group in wanted]
        return [g for g in groups if len(g) == ranks and all(device.arena is not None for device in g)]

    def _least_kv_blocks(self, service: Service) -> int:
        """KV that must fit beside the weights: one request of an explicit context, or a short one."""
        assert service.shape is not None
        return service.blocks_for(service.settings.context or min(service.shape.context, 256))

    def _need(self, service: Service) -> int:
        """Blocks that a service needs on each of its devices at least."""
        return self._state.weights_blocks(service) + self._least_kv_blocks(service)

    def _most_kv(self, service: Service, place: Place) -> int:
        """KV blocks that it could have on each device of a place if all left that can."""
        return min(self._state.most_kv_blocks(device, service) for device in place)

    def context_limit(self, service: Service) -> int:
        """Most tokens (prompt and output) that a request of the service can ever have."""
        assert service.shape is not None
        room = [self._most_kv(service, place) for place in self.places(service)]
        if not room:
            return service.shape.context
        return min(service.shape.context, max(room) // service.run_blocks * service.run_tokens)

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
        for ranks in (wanted,) if wanted else (1, *(shard.ranks for shard in service.shape.shards)):
            misfit = self._misfit(service, ranks)
            if not misfit:
                self._look_at_image(service)
                return
            reason = reason or misfit
        self.refuse(service, reason)

    def _misfit(self, service: Service, ranks: int) -> str:
        """Why no place can ever hold the service split over so many ranks; empty when one can."""
        assert service.shape is not None
        try:
            service.split_over(ranks, self._state.settings)
        except ValueError as error:
            return str(error)
        service.former.clear()
        unit = self._state.settings.block_bytes
        if service.run_tokens == 0:
            return (
                f"one token's KV takes {service.shape.kv_bytes_per_token // ranks} bytes, a block has {unit}"
            )
        places = self.places(service)
        if not places:
            return f"it needs {ranks} devices, and this machine has {len(self._state.devices)} to offer it"
        need = self._need(service)
        most = max(min(device.arena.capacity for device in place if device.arena) for place in places)
        if need <= most:
            return ""
        need_mib, most_mib = need * unit >> 20, most * unit >> 20
        return f"needs {need_mib} MiB (weights and one context), the largest device has {most_mib} MiB"

    # ------------------------------------------------------------------------------- bringing in

    def bring_in_wanted(self) -> None:
        """Start what is wanted and can be started; ask for room where somebody has waited long enough."""
        wanted = [s for s in self._state.services.values() if self._is_wanted(s)]
        for service in sorted(wanted, key=self._order):
            if service.image is not Image.READY:
                self._images.want(service)
            else:
                self._bring_in(service)
        self._replicate_wanted()

    def _replicate_wanted(self) -> None:
        """Give idle devices to services for which one more would pay."""
        state, limits = self._state, self._state.settings.scheduler
        if not limits.replicate or state.now < self._look_at:
            return
        # Often enough to tell for how long a replica would have paid.
        self._look_at = state.now + limits.replicate_seconds / 8
        if not any(is_idle(device) for device in state.devices.values()):
            return
        for service in self._state.services.values():
            watch_pressure(self._state, service)
            if wants_replica(self._state, service):
                self._replicate(service)

    def _replicate(self, service: Service) -> None:
        """Bring a busy service in on idle devices too, taking nothing from anybody."""
        need = self._need(service)
        idle = [
            place
            for place in self.places(service)
            if _available(place) >= need
            and all(
                service.name not in device.replicas
                and is_idle(device)
                and self._state.claim_on(device) is None
                for device in place
            )
        ]
        if not idle:
            return
        if service.image is not Image.READY:
            self._images.want(service)
            return
        if self._start(service, max(idle, key=_available)):
            service.pressed_since = None

    def _is_wanted(self, service: Service) -> bool:
        return (
            service.demand
            and not service.replicas
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
        need, least = self._need(service), self._least_kv_blocks(service)
        able = [place for place in self.places(service) if self._most_kv(service, place) >= least]
        free = [place for place in able if not any(self._promised(device, service) for device in place)]
        # Where it fits as things are; where only idle services must leave, the longest unused first.
        # Fewest neighbours first: compute is what services share, and a larger device has no more of it.
        # Where the plan has it goes before all.
        planned = self._state.planned.get(service.name, ())

        def order(place: Place) -> tuple[bool, int, int]:
            neighbours = sum(len(device.replicas) for device in place)
            return tuple(d.index for d in place) not in planned, neighbours, -_available(place)

        for place in sorted(free, key=order):
            if _available(place) >= need and self._start(service, place):
                return
        if not service.waiting and not service.load_tickets:
            return  # nobody asks for it now: it takes room, but nobody's
        for place in sorted(free, key=lambda p: max(map(self._idle_age, p))):
            if self._evict_idle_for(service, place, need) and self._start(service, place):
                return
        if self._state.now >= self._patience_ends(service):
            self._ask_for_room(service, need, able)

    def _take_turn(self, service: Service) -> None:
        """Come in on the devices that a dedicated service may have, once those there have finished."""
        for place in self.places(service):
            if any(self._loads_another(device, service) for device in place):
                return
            others = dedicated.in_the_way(place, service)
            if not others and self._start(service, place):
                return
            for device in place:
                device.claim = Claim(self._order(service), service.name, load=True)
            for replica in others:
                if replica.stage is Stage.RESIDENT:
                    self._room.drain(replica, admit_below=self._order(service), seconds=None)

    def _evict_idle_for(self, service: Service, place: Place, need: int) -> bool:
        """Evict as few idle services as let this one in, the longest unused first. False if all would not."""
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
        for count in range(len(idle) + 1):
            names = [replica.service for replica in idle[:count]]
            blocks = arena.available + sum(map(arena.weights_of, names))
            if blocks >= need and arena.fits(service.segment_blocks, names, kv_stays=True):
                return idle[:count]
        return None

    def _patience_ends(self, service: Service) -> float:
        """When busy services are asked to make room for this one."""
        if service.load_tickets:
            return 0.0
        oldest = next(iter(service.waiting.values()))
        return oldest.arrived + self._state.settings.scheduler.patience_seconds

    def _idle_age(self, device: Device) -> float:
        """When the most recently used idle service of the device was used last; inf when it has none."""
        return max((r.used for r in self._room.idle(device, keep="")), default=float("inf"))

    def _ask_for_room(self, service: Service, need: int, able: list[Place]) -> None:
        """Claim a place's memory: nobody junior is admitted there, and busy services drain.

        The claim replaces that of a request of a resident service: patience has run out.
        """
        if not able:
            if all(device.state == "up" for device in self._state.devices.values()):
                self._cannot(service)
            return
        free = [
            place
            for place in able
            if not any(self._loads_another(device, service) for device in place)
            and all(self._reachable(device) >= need for device in place)
        ]
        if free:
            place = min(free, key=lambda p: self._asking_costs(p, service))
            for device in place:
                device.claim = Claim(self._order(service), service.name, load=True)
            for device in place:
                if service.demand:  # else it was given up on the device before
                    self._drain_enough(device, service, need)

    def _movable(self, device: Device) -> list[Replica]:
        """Replicas that can be made to leave, those that are leaving first, then the longest resident."""
        replicas = [r for r in device.replicas.values() if self._room.may_leave(r)]
        return sorted(replicas, key=lambda r: (r.stage is not Stage.DRAINING, r.since))

    def _reachable(self, device: Device) -> int:
        """Blocks that are free once all that can leave has left and all that runs has ended."""
        assert device.arena is not None
        leaving = sum(device.arena.weights_of(r.service) for r in self._movable(device))
        return device.arena.available + device.arena.kv + leaving

    def _asking_costs(self, place: Place, service: Service) -> tuple[bool, int, int]:
        """What speaks against a place: that another was asked before, and the work it disturbs."""
        asked = all(d.claim is not None and d.claim.service == service.name for d in place)
        names = {replica.service for device in place for replica in self._movable(device)}
        services = [self._state.services[name] for name in names]
        work = sum(len(s.waiting) + sum(1 for _ in s.running) for s in services)
        return not asked, work, place[0].index

    def _drain_enough(self, device: Device, service: Service, need: int) -> None:
        arena, movable = device.arena, self._movable(device)
        assert arena is not None
        sizes = service.segment_blocks
        coming, leaving = arena.available, list[str]()
        for replica in movable:
            if coming >= need and arena.fits(sizes, leaving, kv_stays=False):
                return
            leaving.append(replica.service)
            if replica.stage is Stage.RESIDENT:
                self._room.drain(
                    replica, admit_below=0, seconds=self._state.settings.scheduler.patience_seconds
                )
            coming += arena.weights_of(replica.service)
            coming += len(_kv_blocks(replica, device))
        if not movable and not arena.kv:
            self._cannot(service)  # all is free that ever will be, and yet no run is long enough

    def _promised(self, device: Device, service: Service) -> bool:
        """Whether the device's memory is somebody else's before it can be the service's."""
        return self._loads_another(device, service) or self._state.claimed(device, self._order(service))

    def _loads_another(self, device: Device, service: Service) -> bool:
        """Whether the device is being cleared for another service."""
        claim = self._state.claim_on(device)
        return claim is not None and claim.load and claim.service != service.name

    def _cannot(self, service: Service) -> None:
        self.load_failed(service, "pinned services leave no room for it on any device")

    def bring(self, service: Service, place: Place) -> bool:
        """Start a replica at a place of the caller's choice, if only idle services have to leave for it."""
        if any(self._promised(device, service) for device in place):
            return False
        if _available(place) >= self._need(service) and self._start(service, place):
            return True
        return self._evict_idle_for(service, place, self._need(service)) and self._start(service, place)

    def set_ranks(self, service: Service, ranks: int) -> None:
        """Have an absent service come in on so many devices; its host image is built anew."""
        assert service.profile is not None
        assert service.shape is not None
        service.split_over(ranks, self._state.settings)
        service.former.clear()
        service.breaks += 1  # prefixes that are still cached were written by other ranks
        service.profile.costs = StepCosts.guess(self._state.settings.roofline, service.shape, ranks)
        self._look_at_image(service)

    def _look_at_image(self, service: Service) -> None:
        """An image for another number of ranks is of no use; one that is being built is looked at later."""
        if service.image is Image.READY and service.image_ranks != service.ranks:
            self._images.drop(service)

    def _start(self, service: Service, place: Place) -> bool:
        """Take the blocks and send the weights on their way. False when no run of blocks is long enough."""
        starts = self._take_runs(service, place)
        if starts is None:
            return False
        state = self._state
        state.copies += 1
        indexes = tuple(device.index for device in place)
        ranks = Ranks([device.arena for device in place if device.arena is not None])
        replica = Replica(service.name, indexes, ranks, starts, state.copies, state.now)
        service.replicas.append(replica)
        service.image_used = state.now
        for rank, device in enumerate(place):
            device.replicas[service.name] = replica
            if device.claim is not None and device.claim.service == service.name:
                device.claim = None
            state.send(device.index, self._copy_in(service, replica, rank))
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

    def _copy_in(self, service: Service, replica: Replica, rank: int) -> CopyIn:
        assert service.shape is not None
        unit, size = self._state.settings.block_bytes, len(replica.devices)
        image_at, extents = rank * sum(service.segments), list[Extent]()
        for start, bytes_ in zip(replica.starts[rank], service.segments, strict=True):
            extents.append(Extent(image_at, bytes_, start * unit))
            image_at += bytes_
        return CopyIn(
            service.name,
            service.directory,
            service.shape.dtype,
            service.shape.context,
            service.image_path,
            tuple(extents),
            replica.copy,
            Group(replica.copy, rank, size) if size > 1 else None,
        )

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

    # ------------------------------------------------------------------------------- outcomes

    def copied(self, replica: Replica, device: Device, seconds: float) -> None:
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
        self._state.note(service.name, f"resident on {replica.place}, copied in {seconds:.3f} s")
        self._state.answer(service.load_tickets)

    def copy_failed(self, replica: Replica, reason: str) -> None:
        """A copy came to nothing: its blocks are free again."""
        service = self._room.remove(replica)
        if service.replicas:  # only the replica more came to nothing
            self._state.note(service.name, f"no replica on {replica.place}: {reason}")
            service.pressed_since = None
        else:
            self.load_failed(service, reason)

    def load_failed(self, service: Service, reason: str) -> None:
        """Tell all who wait, once; the next try is allowed after a pause that doubles."""
        service.failures += 1
        pause = min(MAX_RETRY_SECONDS, 2.0 ** (service.failures - 1))
        service.trouble, service.retry_at = reason, self._state.now + pause
        service.wanted, service.progress = False, None
        self._give_up(service, f"model {service.name!r} could not be loaded: {reason}", pause)

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


def _available(place: Place) -> int:
    """Blocks that can be had at once on each device of a place."""
    return min(device.arena.available for device in place if device.arena is not None)


def _kv_blocks(replica: Replica, device: Device) -> set[int]:
    """Blocks of a device that hold KV of a replica's requests."""
    rank = replica.devices.index(device.index)
    return {block for request in replica.running.values() for block in request.tables[rank]}

"""Which services come into which arena.

Owns placing, host images, and the outcome of copies. Must not form steps, nor know how room is made (`room`)
or why a service is wanted beyond the requests and tickets it has. All waiters of one model share one swap; a
busy service is asked to make room only after somebody has waited `patience_seconds` for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from seallmd.core.arena import Arena
from seallmd.core.events import ToHostProcess
from seallmd.core.messages import BuildImage, CopyIn, DropImage, Extent, MoveBlocks
from seallmd.core.room import Room
from seallmd.core.scaling import is_idle, wants_replica, watch_pressure
from seallmd.core.state import Claim, Device, Image, Life, NodeState, Replica, Service, Stage

MAX_RETRY_SECONDS = 60.0


class Residency:
    """Moves services in and out on the shared state."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._room = room

    # ------------------------------------------------------------------------------- what could fit

    def _least_kv_blocks(self, service: Service) -> int:
        """KV that must fit beside the weights: one request of an explicit context, or a short one."""
        assert service.shape is not None
        tokens = service.settings.context or min(service.shape.context, 256)
        return -(-tokens // service.block_tokens)

    def _arenas(self) -> Iterator[tuple[Device, Arena]]:
        for device in self._state.devices.values():
            if device.arena is not None:
                yield device, device.arena

    def context_limit(self, service: Service) -> int:
        """Most tokens (prompt and output) that a request of the service can ever have."""
        assert service.shape is not None
        room = [self._state.most_kv_blocks(device, service) for device, _ in self._arenas()]
        if not room:
            return service.shape.context
        tokens = max(room) * service.block_tokens
        return min(service.shape.context, tokens)

    def _misfit(self, service: Service) -> str:
        """Why no device can ever hold the service; empty when one can, or when that is not known yet."""
        arenas = [arena for _, arena in self._arenas()]
        if len(arenas) < len(self._state.devices) or not arenas:
            return ""
        unit = self._state.settings.block_bytes
        if service.block_tokens == 0:
            assert service.shape is not None
            return f"one token's KV takes {service.shape.kv_bytes_per_token} bytes, a block has {unit}"
        need = self._state.weights_blocks(service) + self._least_kv_blocks(service)
        most = max(arena.capacity for arena in arenas)
        if need <= most:
            return ""
        need_mib, most_mib = need * unit >> 20, most * unit >> 20
        return f"needs {need_mib} MiB (weights and one context), the largest device has {most_mib} MiB"

    def refuse_misfits(self) -> None:
        """Refuse what no device can ever hold; to be called when a device or a model became known."""
        for service in self._state.services.values():
            if service.shape is not None and not service.refused and (misfit := self._misfit(service)):
                self.refuse(service, misfit)

    # ------------------------------------------------------------------------------- bringing in

    def bring_in_wanted(self) -> None:
        """Start what is wanted and can be started; ask for room where somebody has waited long enough."""
        wanted = [s for s in self._state.services.values() if self._is_wanted(s)]
        for service in sorted(wanted, key=self._order):
            if service.image is not Image.READY:
                self._want_image(service)
            else:
                self._bring_in(service)
        self._replicate_wanted()

    def _replicate_wanted(self) -> None:
        """Give idle devices to services for which one more would pay."""
        if not self._state.settings.scheduler.replicate or not any(
            is_idle(device) for device in self._state.devices.values()
        ):
            return
        for service in self._state.services.values():
            watch_pressure(self._state, service)
            if wants_replica(self._state, service):
                self._replicate(service)

    def _replicate(self, service: Service) -> None:
        """Bring a busy service in on an idle device too, taking nothing from anybody."""
        need = self._state.weights_blocks(service) + self._least_kv_blocks(service)
        idle = [
            (device, arena)
            for device, arena in self._arenas()
            if service.name not in device.replicas
            and is_idle(device)
            and arena.available >= need
            and self._state.claim_on(device) is None
        ]
        if not idle:
            return
        if service.image is not Image.READY:
            self._want_image(service)
            return
        device, _ = max(idle, key=lambda place: place[1].available)
        if self._start(service, device):
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
        need = self._state.weights_blocks(service) + self._least_kv_blocks(service)
        able = [
            (device, arena)
            for device, arena in self._arenas()
            if self._state.most_kv_blocks(device, service) >= self._least_kv_blocks(service)
        ]
        free = [place for place in able if not self._promised(place[0], service)]
        # Where it fits as things are; where only idle services must leave, the longest unused first.
        # Fewest neighbours first: compute is what services share, and a larger device has no more of it.
        for device, arena in sorted(free, key=lambda d: (len(d[0].replicas), -d[1].available)):
            if arena.available >= need and self._start(service, device):
                return
        if not service.waiting and not service.load_tickets:
            return  # nobody asks for it now: it takes room, but nobody's
        for device, _ in sorted(free, key=lambda d: self._idle_age(d[0])):
            if self._evict_idle_for(service, device, need) and self._start(service, device):
                return
        if self._state.now >= self._patience_ends(service):
            self._ask_for_room(service, need, able)

    def _evict_idle_for(self, service: Service, device: Device, need: int) -> bool:
        """Evict as few idle services as let this one in, the longest unused first. False if all would not."""
        arena, idle = device.arena, self._room.idle(device, keep=service.name)
        assert arena is not None
        sizes = service.segment_blocks
        for count in range(1, len(idle) + 1):
            names = [replica.service for replica in idle[:count]]
            blocks = arena.available + sum(map(arena.weights_of, names))
            if blocks >= need and arena.fits(sizes, names, kv_stays=True):
                for replica in idle[:count]:
                    self._room.evict(replica, "idle, its memory was wanted")
                return True
        return False

    def _patience_ends(self, service: Service) -> float:
        """When busy services are asked to make room for this one."""
        if service.load_tickets:
            return 0.0
        oldest = next(iter(service.waiting.values()))
        return oldest.arrived + self._state.settings.scheduler.patience_seconds

    def _idle_age(self, device: Device) -> float:
        """When the most recently used idle service of the device was used last; inf when it has none."""
        return max((r.used for r in self._room.idle(device, keep="")), default=float("inf"))

    def _ask_for_room(self, service: Service, need: int, able: list[tuple[Device, Arena]]) -> None:
        """Claim a device's memory: nobody junior is admitted there, and busy services drain.

        The claim replaces that of a request of a resident service: patience has run out.
        """
        if not able:
            if all(device.state == "up" for device in self._state.devices.values()):
                self._cannot(service)
            return

        free = [
            device
            for device, _ in able
            if not self._loads_another(device, service) and self._reachable(device) >= need
        ]
        if free:
            device = min(free, key=lambda d: self._asking_costs(d, service))
            device.claim = Claim(self._order(service), service.name, load=True)
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

    def _asking_costs(self, device: Device, service: Service) -> tuple[bool, int, int]:
        """What speaks against a device: that another was asked before, and the work it disturbs."""
        asked = device.claim is not None and device.claim.service == service.name
        services = [self._state.services[r.service] for r in self._movable(device)]
        work = sum(len(s.waiting) + sum(1 for _ in s.running) for s in services)
        return not asked, work, device.index

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
            coming += len({block for request in replica.running.values() for block in request.blocks})
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

    def _start(self, service: Service, device: Device) -> bool:
        """Take the blocks and send the weights on their way. False when no run of blocks is long enough."""
        arena, unit = device.arena, self._state.settings.block_bytes
        assert arena is not None
        assert service.shape is not None
        sizes = service.segment_blocks
        placement = arena.place(service.name, sizes, service.former.get(device.index))
        if placement is None:
            return False
        self._move_kv(device, placement.moves)
        if device.claim is not None and device.claim.service == service.name:
            device.claim = None
        self._state.copies += 1
        replica = Replica(service.name, device.index, placement.starts, self._state.copies, self._state.now)
        device.replicas[service.name] = replica
        service.replicas.append(replica)
        service.image_used = self._state.now
        image_at, extents = 0, []
        for start, bytes_ in zip(placement.starts, service.shape.segments, strict=True):
            extents.append(Extent(image_at, bytes_, start * unit))
            image_at += bytes_
        self._state.send(
            device.index,
            CopyIn(
                service.name,
                service.directory,
                service.shape.dtype,
                service.shape.context,
                service.image_path,
                tuple(extents),
                replica.copy,
            ),
        )
        self._state.note(service.name, f"copying to device {device.index}")
        return True

    def _move_kv(self, device: Device, moves: tuple[tuple[int, int], ...]) -> None:
        if not moves:
            return
        renamed = dict(moves)
        for replica in device.replicas.values():
            for request in replica.running.values():
                request.blocks = [renamed.get(block, block) for block in request.blocks]
        self._state.send(device.index, MoveBlocks(tuple(renamed), tuple(renamed.values())))

    # ------------------------------------------------------------------------------- host images

    def _want_image(self, service: Service) -> None:
        if service.image is Image.BUILDING or not self._state.host_up:
            return
        assert service.shape is not None
        self._trim_images(service.shape.weights_bytes)
        service.image = Image.BUILDING
        message = BuildImage(service.name, service.directory, service.shape.dtype, service.shape.context)
        self._state.actions.append(ToHostProcess(message))

    def _trim_images(self, coming_bytes: int) -> None:
        """Drop the images that were used longest ago until `coming_bytes` more are within the limit."""
        held = [s for s in self._state.services.values() if s.image is not Image.NONE]
        total = coming_bytes + sum(s.shape.weights_bytes for s in held if s.shape is not None)
        for service in sorted(held, key=lambda s: s.image_used):
            if total <= self._state.settings.host_bytes:
                return
            copying = any(r.stage is Stage.COPYING for r in service.replicas)
            if service.image is not Image.READY or copying or service.shape is None:
                continue
            service.image = Image.NONE
            total -= service.shape.weights_bytes
            self._state.actions.append(ToHostProcess(DropImage(service.name)))
            for device, _ in self._arenas():
                self._state.send(device.index, DropImage(service.name))

    # ------------------------------------------------------------------------------- outcomes

    def copied(self, device: Device, name: str, seconds: float) -> None:
        """A service is resident."""
        replica, service = device.replicas[name], self._state.services[name]
        replica.move("copied")
        replica.since = replica.used = self._state.now
        service.progress, service.trouble, service.failures, service.wanted = None, "", 0, False
        service.swaps_in += 1
        service.last_swap_seconds = self._state.now - replica.began
        self._state.note(name, f"resident on device {device.index}, copied in {seconds:.3f} s")
        self._state.answer(service.load_tickets)

    def copy_failed(self, device: Device, name: str, reason: str) -> None:
        """A copy came to nothing: its blocks are free again."""
        service = self._room.remove(device.replicas[name])
        assert device.arena is not None
        device.arena.free_weights(name)
        if service.replicas:  # only the replica more came to nothing
            self._state.note(name, f"no replica on device {device.index}: {reason}")
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

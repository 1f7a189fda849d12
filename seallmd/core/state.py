"""What a node knows: its devices, what is on its way there, and all the rest.

Owns these structs and what is done to several of them at once; `service` and `request` have theirs. Must not
decide anything: the node's parts do (`batcher`, `room`, `residency`, `recovery`, ...), on these structs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from seallmd.core.arena import Arena
from seallmd.core.events import Action, Answer, Embedded, Finish, Note, Scored, ToDevice
from seallmd.core.host_kv import HostKv, SavedKv
from seallmd.core.messages import Forget, StepDone, ToWorker
from seallmd.core.request import Life, Request
from seallmd.core.service import Replica, Service
from seallmd.core.settings import NodeSettings
from seallmd.core.sharing import Sharing
from seallmd.core.tiers import FIRST_ORDER

DOWN_SECONDS = 30.0  # a device that is lost is expected back for so long, and requests wait for it

# -------------------------------------------------------------------------------------------- devices


class SentRow(msgspec.Struct):
    """A row on its way: enough to account for its result."""

    request: Request
    epoch: int
    count: int
    sample: bool


class SentStep(msgspec.Struct):
    """A step on its way, noted on each device of its group.

    copy: of the replica that runs it. leader: the device whose answer counts. drawing: rows that draw a
    token. tokens, context: of all rows. incomplete: the worker leaves out rows of requests that failed in the
    step before, so how long it takes says nothing. speedup: by threads that were lent to it.
    """

    id: int
    service: str
    copy: int
    leader: int
    rows: list[SentRow]
    drawing: int
    tokens: int
    context: int
    incomplete: bool = False
    speedup: float = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory of a device is promised: nobody junior to `order` is admitted there until `service` has it.

    load: it is for the service's weights, and no other service is brought in there before.
    """

    order: int
    service: str
    load: bool


@dataclass(slots=True, eq=False)
class Device:
    """One device and all that is on it. arena is None while its worker is starting or lost.

    arena_bytes: while there is none, of the last one; 0 = it never was up. reserved: a replica on several
    devices that found one of them full; its step goes next here. closed: an operator wants it empty.
    """

    index: int
    label: str = ""
    pid: int = 0
    state: str = "starting"
    arena: Arena | None = None
    arena_bytes: int = 0
    replicas: dict[str, Replica] = field(default_factory=dict)
    inflight: dict[int, SentStep] = field(default_factory=dict)
    last_served: str = ""
    claim: Claim | None = None
    reserved: Replica | None = None
    steps: int = 0
    closed: bool = False


@dataclass(slots=True, eq=False)
class NodeState:
    """Everything, and the actions that the event at hand has led to so far.

    planned: the groups of each service's replicas by the best plan known. sharing: who may not be on one
    device. draining: no new requests are taken; stopping: for good. moves: counts what may give others
    memory or a turn: replicas that come, go, or stay after all, and requests that leave. stranded: services
    of which a waiting request has outgrown a device. lost_at: devices that are down, and since when.
    examined: the service whose model the host process examines; empty: none.

    Who is where is asked for after every event and seldom changes: `absent`, `beside` and `group` are kept
    until `moved`.
    """

    settings: NodeSettings
    devices: dict[int, Device]
    services: dict[str, Service]
    host_kv: HostKv
    requests: dict[int, Request] = field(default_factory=dict)
    planned: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    now: float = 0.0
    host_up: bool = False
    examined: str = ""
    draining: bool = False
    stopping: bool = False
    sharing: Sharing = field(default_factory=lambda: Sharing(()))
    orders: int = FIRST_ORDER
    steps: int = 0
    copies: int = 0
    moves: int = 0
    stranded: set[str] = field(default_factory=set)
    lost_at: dict[int, float] = field(default_factory=dict)
    _absent: list[Service] | None = None
    _beside: dict[int, list[Device]] = field(default_factory=dict)
    _groups: dict[tuple[int, ...], list[Device]] = field(default_factory=dict)

    # --------------------------------------------------------------------------- who is where

    @property
    def absent(self) -> list[Service]:
        """Services without a replica, in the order of configuration."""
        if self._absent is None:
            self._absent = [service for service in self.services.values() if not service.replicas]
        return self._absent

    def beside(self, index: int) -> list[Device]:
        """All devices, in order, on which the services of one of them have replicas."""
        found = self._beside.get(index)
        if found is None:
            services = (self.services[name] for name in self.devices[index].replicas)
            found = self._beside[index] = self.devices_of(r for s in services for r in s.replicas)
        return found

    def devices_of(self, replicas: Iterable[Replica]) -> list[Device]:
        """All devices, in order, that any of the replicas is on."""
        indexes = {index for replica in replicas for index in replica.devices}
        return [self.devices[index] for index in sorted(indexes)]

    def moved(self) -> None:
        """Replicas are no longer where they were, or services or devices are others."""
        self.moves += 1
        self._absent = None
        self._beside.clear()
        self._groups.clear()

    def enter(self, replica: Replica) -> None:
        """A replica is on its devices from now on."""
        self.services[replica.service].replicas.append(replica)
        for device in self.group(replica):
            device.replicas[replica.service] = replica
        self.moved()

    def exit(self, replica: Replica) -> None:
        """It is there no longer."""
        self.services[replica.service].replicas.remove(replica)
        for device in self.group(replica):
            del device.replicas[replica.service]
        self.moved()

    def awaits(self, device: Device) -> bool:
        """Whether a device is down and expected back: what has no room without it is not given up."""
        if device.arena is not None or device.closed:
            return False
        return self.now < self.lost_at.get(device.index, self.now) + DOWN_SECONDS

    @property
    def awaits_devices(self) -> bool:
        """Whether any is."""
        return any(map(self.awaits, self.devices.values()))

    # --------------------------------------------------------------------------- common deeds

    def send(self, device: int, message: ToWorker) -> None:
        """Tell a worker something."""
        self.actions.append(ToDevice(device, message))

    def note(self, service: str, text: str) -> None:
        """Tell the operator something."""
        self.actions.append(Note(service, text))

    def answer(self, tickets: list[int], error: str = "") -> None:
        """End operators' commands."""
        self.actions.extend(Answer(ticket, error) for ticket in tickets)
        tickets.clear()

    def weights_blocks(self, service: Service) -> int:
        """Blocks of a service's weights, on each of its ranks."""
        return sum(service.segment_blocks)

    def group(self, replica: Replica) -> list[Device]:
        """The devices of a replica, in rank order; not to be changed."""
        found = self._groups.get(replica.devices)
        if found is None:
            found = self._groups[replica.devices] = [self.devices[index] for index in replica.devices]
        return found

    def strangers(self, device: Device, name: str) -> list[Replica]:
        """Who is on a device and may not be there beside the service of that name."""
        if not self.sharing.groups:
            return []
        return [r for other, r in device.replicas.items() if self.sharing.apart(name, other)]

    def most_kv_blocks(self, device: Device, service: Service) -> int:
        """KV blocks that a service could have on a device if all left that can: pinned services stay."""
        assert device.arena is not None
        pinned = sum(
            device.arena.weights_of(name)
            for name in device.replicas
            if name != service.name and self.services[name].settings.pinned
        )
        return max(0, device.arena.capacity - pinned - self.weights_blocks(service))

    def most_kv_blocks_of(self, replica: Replica) -> int:
        """The same for a replica: what each of its ranks could have."""
        service = self.services[replica.service]
        return min(self.most_kv_blocks(device, service) for device in self.group(replica))

    def claim(self, device: Device, order: int, service: str) -> None:
        """Keep juniors of a request from taking the device's memory; a claim that goes before stays."""
        standing = self.claim_on(device)
        if standing is None or (not standing.load and standing.order > order):
            device.claim = Claim(order, service, load=False)

    def claimed(self, device: Device, order: int) -> bool:
        """Whether somebody senior to `order` waits for memory of this device."""
        claim = self.claim_on(device)
        return claim is not None and claim.order < order

    def claim_on(self, device: Device) -> Claim | None:
        """The device's claim; one that is moot is dropped."""
        claim = device.claim
        if claim is not None and claim.load:
            device.claim = self._load_claim(claim)
        elif claim is not None:
            service = self.services[claim.service]
            if claim.order not in service.waiting or claim.service not in device.replicas:
                device.claim = None
        return device.claim

    def _load_claim(self, claim: Claim) -> Claim | None:
        """What is left of a claim for a load: when the first who waited has gone, it is the next one's."""
        service = self.services[claim.service]
        if service.replicas or not (service.waiting or service.load_tickets):
            return None
        if claim.order in service.waiting or service.load_tickets:
            return claim
        return Claim(next(iter(service.waiting)), claim.service, load=True)

    def leave(self, request: Request) -> None:
        """Give back all that a running request holds: the workers forget it, its blocks are free."""
        replica = request.replica
        assert replica is not None
        del replica.running[request.id]
        self.services[request.service].changed()
        self.moves += 1
        replica.ranks.release(request.tables)
        if request.announced:
            for device in replica.devices:
                self.send(device, Forget((request.id,)))
        request.tables = ()
        request.replica = None
        request.announced = False

    def drop_saved(self, request: Request) -> None:
        """The KV that a request has in host memory, if any, is of no use any more."""
        if request.saved is not None:
            self.host_kv.drop(request.saved)
            request.saved = None
            self.services[request.service].changed()

    def tell(self, done: StepDone, sent: SentStep) -> None:
        """Pass on log-probabilities and parts of vectors, and end what failed in a step that went well.

        Whichever life of a request they are of: what was told is not asked for again. But not of rows whose
        tokens do not count: those come again, and all that belongs to them.
        """
        void = {row.request.id for row in sent.rows if row.epoch < row.request.trusted}
        for scores in done.scores:
            request = self.requests.get(scores.request)
            if request is not None and request.id not in void:
                if scores.position < request.prompt:
                    request.told = scores.position + scores.tokens
                self.actions.append(Scored(request.id, scores))
        for pooled in done.pooled:
            request = self.requests.get(pooled.request)
            if request is not None and request.id not in void:
                request.told = pooled.position + pooled.tokens
                self.actions.append(Embedded(request.id, pooled))
        for row in done.failed:
            if (request := self.requests.get(row.request)) is not None:
                error = f"the output cannot follow its grammar: {row.reason}"
                self.finish(request, "failed", error, code="grammar_failed", status=400)

    def finish(
        self,
        request: Request,
        reason: str,
        error: str = "",
        *,
        code: str = "",
        status: int = 0,
        retry_after: float = 0.0,
    ) -> None:
        """End a request, wherever it is. Its rows on the way no longer count."""
        self.drop_saved(request)
        if request.life is Life.RUNNING:
            self.leave(request)
        else:
            self.services[request.service].dequeue(request)
        self.moves += 1
        request.move("finish")
        self.services[request.service].idle_since = self.now
        del self.requests[request.id]
        self.actions.append(Finish(request.id, reason, error, code, status, retry_after))

    def preempt(self, request: Request, why: str) -> None:
        """Take a running request's memory; it waits, keeps its tokens, and its KV where that is cheaper."""
        service = self.services[request.service]
        if not request.landing:
            service.saves += self._save(request)
        self._queue_again(request, service)
        service.preemptions += 1
        kept = "its KV goes to host memory" if request.saved else "its KV will be computed again"
        self.note(service.name, f"request {request.id} preempted, {kept}: {why}")

    def restart(self, request: Request) -> None:
        """Have a running request's KV computed again: what its worker held is lost or not to be trusted."""
        service = self.services[request.service]
        self.drop_saved(request)
        self._queue_again(request, service)
        request.trusted = request.epoch
        service.restarts += 1

    def _queue_again(self, request: Request, service: Service) -> None:
        self.leave(request)
        request.move("preempt")
        request.epoch += 1
        request.scheduled = request.computed = request.indexed = 0
        request.parents = []
        request.landing = False
        service.enqueue(request)

    def _save(self, request: Request) -> bool:
        """Send a request's KV to host memory, if there is room and computing it again would take longer."""
        service, replica = self.services[request.service], request.replica
        assert replica is not None
        assert service.profile is not None
        if self.host_kv.available(replica.devices) < len(request.tables[0]):
            return False
        if self.copy_seconds(request) >= service.profile.prefill_seconds(request.scheduled):
            return False
        request.saved, told = self.host_kv.save(
            request.id, replica.devices, request.tables, request.scheduled
        )
        for device, message in told:
            self.send(device, message)
        return True

    def copy_seconds(self, request: Request) -> float:
        """To host memory and back, of the KV of a running request."""
        bytes_ = len(request.tables[0]) * self.settings.block_bytes
        return 2 * bytes_ / self.settings.roofline.copy_bytes_per_second

    # --------------------------------------------------------------------------- on its way

    def migrate(self, request: Request, replica: Replica, why: str) -> bool:
        """Have a running request go on in another replica of its service, which has blocks to spare for it.

        Its KV goes by host memory; False where that has no room for it, or computing again would be quicker.
        """
        service, former, tokens = self.services[request.service], request.replica, request.scheduled
        assert former is not None
        assert former is not replica
        blocks = len(request.tables[0])
        if request.landing or not self._save(request):
            return False
        self.leave(request)
        request.move("migrate")
        request.epoch += 1
        request.replica, request.tables = replica, replica.ranks.take(blocks)
        request.scheduled, request.computed, request.indexed = tokens, 0, 0
        request.parents = replica.ranks.roots(service.root_of(request))
        request.landing = True
        replica.running[request.id] = request
        service.migrations += 1
        self.note(service.name, f"request {request.id} moves from {former.place} to {replica.place}: {why}")
        return True

    def has_room(self, replica: Replica, requests: Sequence[Request]) -> bool:
        """Whether a replica has memory for running requests of another, and for the next tokens of all."""
        next_tokens = (len(replica.running) + len(requests)) * self.services[replica.service].run_blocks
        blocks = sum(len(request.tables[0]) for request in requests)
        if replica.ranks.available < blocks + next_tokens:
            return False
        most_junior = max(request.order for request in requests)
        return not any(self.claimed(device, most_junior) for device in self.group(replica))

    def blocks_copied(self, device: int, copy: int) -> None:
        """A worker has saved blocks, or read those of another: whoever waited for that goes on."""
        saved = self.host_kv.copied(device, copy)
        request = None if saved is None else self.requests.get(saved.request)
        if saved is None or request is None or request.saved is not saved:
            return
        self.services[request.service].changed()
        self.moves += 1
        if request.landing:
            self.restore(request, saved)
            request.landing, request.computed = False, request.scheduled

    def restore(self, request: Request, saved: SavedKv, skip: int = 0) -> None:
        """Fill the blocks of a request that is in a replica again, all but the first `skip`."""
        assert request.replica is not None
        for device, message in self.host_kv.restore(saved, request.replica.devices, request.tables, skip):
            self.send(device, message)
        request.saved = None
        self.services[request.service].changed()

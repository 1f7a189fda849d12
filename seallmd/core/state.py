"""What a node knows: services, replicas, devices, and their life cycles; requests are in `request`.

Owns the structs and the tables of legal transitions. Must not decide anything: `batcher`, `residency`,
`scheduler` and `node` do, on these structs, and nobody else may change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from seallmd.core.arena import Arena
from seallmd.core.events import Action, Answer, Finish, Note, Scored, ToDevice
from seallmd.core.host_kv import HostSlots
from seallmd.core.messages import Forget, ModelShape, RowFailed, SaveBlocks, Scores, ToWorker
from seallmd.core.profile import ServiceProfile
from seallmd.core.ranks import Ranks
from seallmd.core.rate import Rate
from seallmd.core.request import IllegalTransition, Life, Request, SavedKv
from seallmd.core.settings import NodeSettings, ServiceSettings
from seallmd.core.sharing import Sharing

# ------------------------------------------------------------------------------------------- services


class Stage(Enum):
    """A replica's state. An absent service has no replica."""

    COPYING = "copying"
    RESIDENT = "resident"
    DRAINING = "draining"  # on its way out: no new work but what is senior to `Replica.admit_below`


REPLICA_LIFE = {
    (Stage.COPYING, "copied"): Stage.RESIDENT,
    (Stage.RESIDENT, "drain"): Stage.DRAINING,
    (Stage.DRAINING, "keep"): Stage.RESIDENT,
}


@dataclass(slots=True, eq=False)
class Replica:
    """A service on a group of devices, or on its way there. More than one: tensor parallel, in rank order.

    ranks: its arenas. starts: first block of each segment, by rank. copy: number of the copy that brings it
    in, and of its group. arrived: devices where the copy is done. running: requests that hold blocks here, by
    id. since: when it became resident. used: when a step of it was last sent; served: whether one was.
    drain_until: when running requests are preempted to let it go (None: never, they are finished).
    admit_below: while draining, requests of a lower order are still admitted. leaving: a plan wants it gone,
    or a request has outgrown it.
    operations: what of the model fast operations replaced, and how often.
    """

    service: str
    devices: tuple[int, ...]
    ranks: Ranks
    starts: tuple[tuple[int, ...], ...]
    copy: int
    began: float
    stage: Stage = Stage.COPYING
    arrived: set[int] = field(default_factory=set)
    running: dict[int, Request] = field(default_factory=dict)
    since: float = 0.0
    used: float = 0.0
    served: bool = False
    admit_below: int = 0
    drain_until: float | None = None
    leaving: bool = False
    operations: tuple[tuple[str, int], ...] = ()

    @property
    def leader(self) -> int:
        """The device of rank 0: its answers count."""
        return self.devices[0]

    @property
    def place(self) -> str:
        """Where it is, for people."""
        indexes = "+".join(map(str, self.devices))
        return f"device {indexes}" if len(self.devices) == 1 else f"devices {indexes}"

    def move(self, event: str) -> None:
        """Take one step of the life cycle. Raises IllegalTransition."""
        try:
            self.stage = REPLICA_LIFE[self.stage, event]
        except KeyError:
            raise IllegalTransition(f"{self.service} is {self.stage.value}: cannot {event}") from None


class Image(Enum):
    """Whether the host holds a service's weights ready to be copied."""

    NONE = "none"
    BUILDING = "building"
    READY = "ready"


@dataclass(slots=True, eq=False)
class Service:
    """One configured service.

    shape, profile: None until probed. ranks: tensor-parallel ranks of each replica. segment_blocks: of each
    weights segment on one rank; run_tokens, run_blocks: so many tokens have their KV in so many blocks of a
    rank; run_tokens is 0 when not even one fits. refused: why it can never be served. trouble: why its last
    load failed, and retry_at when the next may be tried. wanted: bring it in unasked (preload, or it was
    resident when its worker died). evicted: by an operator, and nobody has asked for it since. pressed_since:
    since when another replica would pay. left_at: when a replica of it last left; asks_at: when it is looked
    at next whether others are to leave for it. former: where its weights lay last, by device. tickets:
    operators that wait for it. suspects: requests that were in a step that failed. crashes: how often in a
    row a process died of it, lastly at crashed_at. breaks: how often its ranks fell apart or changed;
    prefixes from before are not found again. stranded: a waiting request has outgrown a device that it is on.
    restarts: of its requests, after failures. closed: an operator
    wants no new requests for it. idle_since: when its last request ended. keep_seconds: what a client wants
    instead of `idle_seconds`. outgoing: it has left the configuration, and goes when its requests have ended;
    successor: what then takes its name.
    """

    settings: ServiceSettings
    shape: ModelShape | None = None
    directory: str = ""
    ranks: int = 1
    segments: tuple[int, ...] = ()
    segment_blocks: tuple[int, ...] = ()
    run_tokens: int = 0
    run_blocks: int = 1
    refused: str = ""
    trouble: str = ""
    failures: int = 0
    retry_at: float = 0.0
    wanted: bool = False
    evicted: bool = False
    image: Image = Image.NONE
    image_path: str = ""
    image_ranks: int = 1
    image_used: float = 0.0
    pressed_since: float | None = None
    left_at: float = 0.0
    asks_at: float = 0.0
    replicas: list[Replica] = field(default_factory=list)
    waiting: dict[int, Request] = field(default_factory=dict)  # by order, most senior first
    waiting_tokens: int = 0
    former: dict[int, tuple[int, ...]] = field(default_factory=dict)
    load_tickets: list[int] = field(default_factory=list)
    evict_tickets: list[int] = field(default_factory=list)
    progress: tuple[str, int, int] | None = None
    rate: Rate = field(default_factory=Rate)
    arrivals: Rate = field(default_factory=lambda: Rate(60.0))
    profile: ServiceProfile | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    restarts: int = 0
    saves: int = 0
    suspects: set[int] = field(default_factory=set)
    crashes: int = 0
    crashed_at: float = 0.0
    breaks: int = 0
    stranded: bool = False
    cached_tokens: int = 0
    swaps_in: int = 0
    swap_seconds: float = 0.0
    last_swap_seconds: float = 0.0
    closed: bool = False
    idle_since: float = 0.0
    keep_seconds: float | None = None
    outgoing: bool = False
    successor: ServiceSettings | None = None

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.settings.name

    @property
    def running(self) -> Iterator[Request]:
        """Requests that hold blocks, on any device."""
        return (request for replica in self.replicas for request in replica.running.values())

    def enqueue(self, request: Request) -> None:
        """Have a request wait, among the others by seniority."""
        last = next(reversed(self.waiting), 0)
        self.waiting[request.order] = request
        if last > request.order:
            self.waiting = dict(sorted(self.waiting.items()))
        self.waiting_tokens += len(request.tokens)

    def dequeue(self, request: Request) -> None:
        """It waits no longer."""
        del self.waiting[request.order]
        self.waiting_tokens -= len(request.tokens)

    def share(self, replica: Replica) -> int:
        """Requests that a replica may run at most while others could run the rest."""
        others = [r for r in self.replicas if r is not replica and r.stage is Stage.RESIDENT]
        running = sum(len(r.running) for r in [replica, *others])
        return -(-(running + len(self.waiting)) // (len(others) + 1))

    @property
    def demand(self) -> bool:
        """Whether somebody wants it resident."""
        return bool(self.waiting or self.load_tickets or self.wanted)

    def split_over(self, ranks: int, settings: NodeSettings) -> None:
        """Have replicas of so many ranks from now on. In units of blocks: those are asked for at every step.

        Raises ValueError when the model cannot be split so.
        """
        assert self.shape is not None
        assert not self.replicas, f"{self.name} is resident with {self.ranks} ranks"
        shard = self.shape.shard(ranks)
        self.ranks, self.segments = ranks, shard.segments
        self.segment_blocks = tuple(-(-size // settings.block_bytes) for size in shard.segments)
        bytes_ = [
            self.shape.itemsize * layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in shard.layers
        ]
        split = settings.kv_layout == "split"
        self.run_blocks = len(bytes_) if split else 1
        self.run_tokens = settings.block_bytes // (max(bytes_) if split else sum(bytes_))

    @property
    def image_bytes(self) -> int:
        """Size of the host image: every rank's part."""
        return self.ranks * sum(self.segments)

    def blocks_for(self, tokens: int) -> int:
        """Blocks on each rank that hold the KV of so many tokens."""
        return -(-tokens // self.run_tokens) * self.run_blocks


# -------------------------------------------------------------------------------------------- devices


@dataclass(slots=True)
class SentRow:
    """A row on its way: enough to account for its result."""

    request: Request
    epoch: int
    count: int
    sample: bool


@dataclass(slots=True)
class SentStep:
    """A step on its way, noted on each device of its group.

    copy: of the replica that runs it. leader: the device whose answer counts. incomplete: the worker leaves
    out rows of requests that failed in the step before, so how long it takes says nothing.
    """

    id: int
    service: str
    copy: int
    leader: int
    rows: list[SentRow]
    tokens: int
    context: int
    incomplete: bool = False


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

    reserved: a replica on several devices that found one of them full; its step goes next here. closed: an
    operator wants it empty.
    """

    index: int
    label: str = ""
    pid: int = 0
    state: str = "starting"
    arena: Arena | None = None
    arena_bytes: int = 0
    host: HostSlots = field(default_factory=lambda: HostSlots(0))
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
    device. draining: no new requests are taken; stopping: for good.
    """

    settings: NodeSettings
    devices: dict[int, Device]
    services: dict[str, Service]
    requests: dict[int, Request] = field(default_factory=dict)
    planned: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    now: float = 0.0
    host_up: bool = False
    draining: bool = False
    stopping: bool = False
    sharing: Sharing = field(default_factory=lambda: Sharing(()))
    orders: int = 0
    steps: int = 0
    copies: int = 0
    leaves: int = 0

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
        """The devices of a replica, in rank order."""
        return [self.devices[index] for index in replica.devices]

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
        if claim is not None:
            service = self.services[claim.service]
            waits = claim.order in service.waiting or (claim.load and service.load_tickets)
            in_place = not service.replicas if claim.load else claim.service in device.replicas
            if not waits or not in_place:
                device.claim = None
        return device.claim

    def leave(self, request: Request) -> None:
        """Give back all that a running request holds: the workers forget it, its blocks are free."""
        replica = request.replica
        assert replica is not None
        del replica.running[request.id]
        self.leaves += 1
        replica.ranks.release(request.tables)
        if request.announced:
            for device in replica.devices:
                self.send(device, Forget((request.id,)))
        request.tables = ()
        request.replica = None
        request.announced = False

    def drop_saved(self, request: Request) -> None:
        """The KV that a waiting request has in host memory, if any, is of no use any more."""
        if request.saved is not None:
            for device, slots in zip(request.saved.devices, request.saved.slots, strict=True):
                self.devices[device].host.release(slots)
            request.saved = None

    def tell(self, scores: tuple[Scores, ...], failed: tuple[RowFailed, ...]) -> None:
        """Pass on log-probabilities, and end what failed in a step that went well.

        Whichever life of a request they are of: what was told is not asked for again.
        """
        for told in scores:
            if (request := self.requests.get(told.request)) is not None:
                if told.position < request.prompt:
                    request.scored = told.position + told.tokens
                self.actions.append(Scored(request.id, told))
        for row in failed:
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
        if request.life is Life.RUNNING:
            self.leave(request)
        else:
            self.drop_saved(request)
            self.services[request.service].dequeue(request)
        request.move("finish")
        self.services[request.service].idle_since = self.now
        del self.requests[request.id]
        self.actions.append(Finish(request.id, reason, error, code, status, retry_after))

    def preempt(self, request: Request, why: str) -> None:
        """Take a running request's memory; it waits, keeps its tokens, and its KV where that is cheaper."""
        service = self.services[request.service]
        saved = self._save(request, service)
        self._queue_again(request, service)
        request.saved = saved
        service.preemptions += 1
        service.saves += saved is not None
        kept = "its KV goes to host memory" if saved else "its KV will be computed again"
        self.note(service.name, f"request {request.id} preempted, {kept}: {why}")

    def restart(self, request: Request) -> None:
        """Have a running request's KV computed again: what its worker held is lost or not to be trusted."""
        service = self.services[request.service]
        self._queue_again(request, service)
        request.trusted = request.epoch
        service.restarts += 1

    def _queue_again(self, request: Request, service: Service) -> None:
        self.leave(request)
        request.move("preempt")
        request.epoch += 1
        request.scheduled = request.computed = request.indexed = 0
        request.parents = []
        service.enqueue(request)

    def _save(self, request: Request, service: Service) -> SavedKv | None:
        """Send a request's KV to host memory, if it has room and computing it again would take longer."""
        replica = request.replica
        assert replica is not None
        assert service.profile is not None
        blocks, group = len(request.tables[0]), self.group(replica)
        link = self.settings.roofline.copy_bytes_per_second
        there_and_back = 2 * blocks * self.settings.block_bytes / link
        if min(device.host.available for device in group) < blocks:
            return None
        if there_and_back >= service.profile.prefill_seconds(request.scheduled):
            return None
        slots = tuple(device.host.take(blocks) for device in group)
        for device, table, kept in zip(group, request.tables, slots, strict=True):
            self.send(device.index, SaveBlocks(tuple(table), tuple(kept)))
        return SavedKv(replica.devices, slots, request.scheduled)

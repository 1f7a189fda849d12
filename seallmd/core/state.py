"""What a node knows: requests, services, replicas, devices, and their life cycles.

Owns the structs and the tables of legal transitions. Must not decide anything: `batcher`, `residency`,
`scheduler` and `node` do, on these structs, and nobody else may change them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from seallmd.core.arena import Arena
from seallmd.core.events import Action, Answer, Finish, Note, ToDevice
from seallmd.core.messages import Forget, ModelShape, Sampling, ToWorker
from seallmd.core.profile import ServiceProfile
from seallmd.core.rate import Rate
from seallmd.core.settings import NodeSettings, ServiceSettings


class IllegalTransition(RuntimeError):
    """A life cycle was asked for a step that its table does not have; nothing was changed."""


# ------------------------------------------------------------------------------------------- requests


class Life(Enum):
    """A request's state."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


REQUEST_LIFE = {
    (Life.WAITING, "admit"): Life.RUNNING,
    (Life.RUNNING, "preempt"): Life.WAITING,
    (Life.WAITING, "finish"): Life.DONE,
    (Life.RUNNING, "finish"): Life.DONE,
}


@dataclass(slots=True, eq=False)
class Request:
    """One request, from `Arrived` to its `Finish`.

    order: arrival order, the seniority by which memory is given. tokens: prompt and every generated token
    that was seen. scheduled, computed: tokens whose KV steps on their way, or done, have written. drawn:
    generated tokens, those still on their way included. inflight: rows in steps on their way. epoch: counts
    preemptions, so that rows of an earlier life are told apart. budget, attained: seconds of execution it
    may take before its rank falls, and that it has taken (SeaLLM's doubling budget).
    """

    id: int
    service: str
    order: int
    arrived: float
    tokens: list[int]
    prompt: int
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    root: Hashable
    leader: int
    life: Life = Life.WAITING
    device: int = -1
    blocks: list[int] = field(default_factory=list)
    scheduled: int = 0
    computed: int = 0
    drawn: int = 0
    inflight: int = 0
    epoch: int = 0
    cached: int = 0
    indexed: int = 0
    parent: Hashable = None
    announced: bool = False
    emitted: bool = False
    budget: float = 0.0
    attained: float = 0.0
    doublings: int = 0

    def move(self, event: str) -> None:
        """Take one step of the life cycle. Raises IllegalTransition."""
        try:
            self.life = REQUEST_LIFE[self.life, event]
        except KeyError:
            raise IllegalTransition(f"request {self.id} is {self.life.value}: cannot {event}") from None

    @property
    def pending(self) -> int:
        """Tokens known to the worker whose KV no step has been asked to write."""
        return self.prompt + self.drawn - self.scheduled

    @property
    def runnable(self) -> bool:
        """Whether another row makes sense: something is left to draw."""
        return self.drawn < self.max_tokens


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
    """A service on a device, or on its way there.

    starts: first block of each segment. copy: number of the copy that brings it in. running: requests that
    hold blocks here, by id. since: when it became resident. used: when a step of it was last sent; served:
    whether one was. drain_until: when running requests are preempted to let it go (None: never, they are
    finished). admit_below: while draining, requests of a lower order are still admitted.
    """

    service: str
    device: int
    starts: tuple[int, ...]
    copy: int
    began: float
    stage: Stage = Stage.COPYING
    running: dict[int, Request] = field(default_factory=dict)
    since: float = 0.0
    used: float = 0.0
    served: bool = False
    admit_below: int = 0
    drain_until: float | None = None

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

    shape, profile: None until probed. segment_blocks: of each weights segment; block_tokens: whose KV one
    block holds, 0 when not even one fits. refused: why it can never be served. trouble: why its last load
    failed, and retry_at when the next may be tried. wanted: bring it in unasked (preload, or it was resident
    when its worker died). pressed_since: since when another replica would pay. former: where its weights lay
    last, by device. tickets: operators that wait for it.
    """

    settings: ServiceSettings
    shape: ModelShape | None = None
    directory: str = ""
    segment_blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    refused: str = ""
    trouble: str = ""
    failures: int = 0
    retry_at: float = 0.0
    wanted: bool = False
    image: Image = Image.NONE
    image_path: str = ""
    image_used: float = 0.0
    pressed_since: float | None = None
    replicas: list[Replica] = field(default_factory=list)
    waiting: dict[int, Request] = field(default_factory=dict)  # by order, most senior first
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
    swaps_in: int = 0
    last_swap_seconds: float = 0.0

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.settings.name

    @property
    def running(self) -> Iterator[Request]:
        """Requests that hold blocks, on any device."""
        return (request for replica in self.replicas for request in replica.running.values())

    def share(self, replica: Replica) -> int:
        """Requests that a replica may run at most while others could run the rest."""
        others = [r for r in self.replicas if r is not replica and r.stage is Stage.RESIDENT]
        running = sum(len(r.running) for r in [replica, *others])
        return -(-(running + len(self.waiting)) // (len(others) + 1))

    @property
    def demand(self) -> bool:
        """Whether somebody wants it resident."""
        return bool(self.waiting or self.load_tickets or self.wanted)

    def examine(self, directory: str, shape: ModelShape, block_bytes: int) -> None:
        """Take in what the probe learnt, in units of blocks as well: those are asked for at every step."""
        self.directory, self.shape, self.progress = directory, shape, None
        self.segment_blocks = tuple(-(-size // block_bytes) for size in shape.segments)
        self.block_tokens = block_bytes // shape.kv_bytes_per_token


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
    """A step on its way."""

    id: int
    service: str
    rows: list[SentRow]
    tokens: int
    context: int


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
    """One device and all that is on it. arena is None while its worker is starting or lost."""

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
    steps: int = 0


@dataclass(slots=True, eq=False)
class NodeState:
    """Everything, and the actions that the event at hand has led to so far."""

    settings: NodeSettings
    devices: dict[int, Device]
    services: dict[str, Service]
    requests: dict[int, Request] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    now: float = 0.0
    host_up: bool = False
    draining: bool = False
    orders: int = 0
    steps: int = 0
    copies: int = 0

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
        """Blocks of a service's weights."""
        return sum(service.segment_blocks)

    def most_kv_blocks(self, device: Device, service: Service) -> int:
        """KV blocks that a service could have on a device if all left that can: pinned services stay."""
        assert device.arena is not None
        pinned = sum(
            device.arena.weights_of(name)
            for name in device.replicas
            if name != service.name and self.services[name].settings.pinned
        )
        return max(0, device.arena.capacity - pinned - self.weights_blocks(service))

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

    def leave_device(self, request: Request) -> None:
        """Give back all that a running request holds: the worker forgets it, its blocks are free."""
        device = self.devices[request.device]
        assert device.arena is not None
        del device.replicas[request.service].running[request.id]
        device.arena.release(request.blocks)
        if request.announced:
            self.send(device.index, Forget((request.id,)))
        request.blocks = []
        request.device = -1
        request.announced = False

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
            self.leave_device(request)
        else:
            del self.services[request.service].waiting[request.order]
        request.move("finish")
        del self.requests[request.id]
        self.actions.append(Finish(request.id, reason, error, code, status, retry_after))

    def preempt(self, request: Request, why: str) -> None:
        """Take a running request's memory; it waits, keeps its tokens, and computes its KV again later."""
        service = self.services[request.service]
        self.leave_device(request)
        request.move("preempt")
        request.epoch += 1
        request.scheduled = request.computed = request.indexed = 0
        request.parent = None
        service.waiting = dict(sorted([*service.waiting.items(), (request.order, request)]))
        service.preemptions += 1
        self.note(service.name, f"request {request.id} preempted: {why}")

"""What a node knows of one service, and of each of its replicas.

Owns these structs and the table of a replica's legal transitions. Must not decide anything, nor know devices.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import TYPE_CHECKING

from seallmd.core.profile import ServiceProfile
from seallmd.core.ranks import Ranks
from seallmd.core.rate import Rate
from seallmd.core.request import IllegalTransition, Request
from seallmd.core.settings import NodeSettings, ServiceSettings
from seallmd.core.shapes import ModelShape
from seallmd.core.tiers import arrival_of

if TYPE_CHECKING:
    from seallmd.core.outlook import Outlook


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
    admit_below: while draining, requests of a lower order are still admitted, of these the ones up to the
    arrival number admit_until, whatever their tier (None: all). leaving: a plan wants it gone, or a request
    has outgrown it. operations: what of the model fast operations replaced, and how often.
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
    admit_until: int | None = None
    drain_until: float | None = None
    leaving: bool = False
    operations: tuple[tuple[str, int], ...] = ()

    def lets_in(self, order: int) -> bool:
        """Whether it takes a request of such an order, or is still to take it before it goes."""
        if self.stage is not Stage.DRAINING:
            return True
        came = self.admit_until is None or arrival_of(order) <= self.admit_until
        return came and order < self.admit_below

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
    load failed, and retry_at when the next may be tried; image_retry_at: the same for an image that only a
    replica more needs. hurried: a client waits for it to be examined. wanted: bring it in unasked (preload,
    or it was resident when its worker died). wait_bias: by how much requests lately waited longer than was
    expected, a factor. evicted: by an operator, and nobody has asked for it since. pressed_since: since when
    another replica would pay. left_at: when a replica of it last left; asks_at: when it is looked at next
    whether others are to leave for it. former: where its weights lay last, by device; return_seconds: how
    long it took lately to come in where it had been before, 0 = it never did. tickets: operators that wait
    for it. suspects: requests that were in a step that failed. crashes: how often in a row a process died of
    it, lastly at crashed_at. breaks: how often its ranks fell apart; prefixes from before are not found
    again. restarts: of its requests, after failures. closed: an operator wants no new requests for it.
    idle_since: when its last request ended; pause_seconds: how long it lately had none before the next one
    came. keep_seconds: what a client wants instead of `idle_seconds`. outgoing: it has left the
    configuration, and goes when its requests have ended; successor: what then takes its name. outlooks: of
    its replicas, by copy, since it last changed; stuck: those on several devices that could run nothing
    although there was work, since then too: the `moves` of that time, and until when it counts.
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
    wait_bias: float = 1.0
    retry_at: float = 0.0
    hurried: bool = False
    wanted: bool = False
    evicted: bool = False
    image: Image = Image.NONE
    image_path: str = ""
    image_ranks: int = 1
    image_used: float = 0.0
    image_retry_at: float = 0.0
    pressed_since: float | None = None
    left_at: float = 0.0
    asks_at: float = 0.0
    replicas: list[Replica] = field(default_factory=list)
    waiting: dict[int, Request] = field(default_factory=dict)  # by order, most senior first
    deferred: int = 0  # of these: batch work
    waiting_tokens: int = 0  # without those of batch work, like `urgent`
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
    migrations: int = 0
    suspects: set[int] = field(default_factory=set)
    crashes: int = 0
    crashed_at: float = 0.0
    breaks: int = 0
    cached_tokens: int = 0
    swaps_in: int = 0
    swap_seconds: float = 0.0
    last_swap_seconds: float = 0.0
    return_seconds: float = 0.0
    closed: bool = False
    idle_since: float = 0.0
    pause_seconds: float = inf
    keep_seconds: float | None = None
    outgoing: bool = False
    successor: ServiceSettings | None = None
    outlooks: dict[int, Outlook] = field(default_factory=dict)
    stuck: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.settings.name

    @property
    def running(self) -> Iterator[Request]:
        """Requests that hold blocks, on any device."""
        return (request for replica in self.replicas for request in replica.running.values())

    def changed(self) -> None:
        """Its requests, where they are, or its profile are no longer what they were."""
        self.outlooks.clear()
        self.stuck.clear()

    def enqueue(self, request: Request) -> None:
        """Have a request wait, among the others by seniority."""
        self.changed()
        last = next(reversed(self.waiting), 0)
        self.waiting[request.order] = request
        if last > request.order:
            self.waiting = dict(sorted(self.waiting.items()))
        self._count(request, 1)

    def dequeue(self, request: Request) -> None:
        """It waits no longer."""
        self.changed()
        del self.waiting[request.order]
        self._count(request, -1)

    def _count(self, request: Request, times: int) -> None:
        if request.deferred:
            self.deferred += times
        else:
            self.waiting_tokens += times * len(request.tokens)

    @property
    def urgent(self) -> int:
        """How many requests wait that are not batch work; they come first in `waiting`."""
        return len(self.waiting) - self.deferred

    def root_of(self, request: Request) -> Hashable:
        """What prefixes that a request may share begin with."""
        return (request.root, self.breaks)

    def others(self, replica: Replica) -> list[Replica]:
        """Its other replicas that take requests."""
        return [r for r in self.replicas if r is not replica and r.stage is Stage.RESIDENT]

    def share(self, replica: Replica) -> int:
        """Requests that a replica may run at most while others could run the rest."""
        others = self.others(replica)
        running = sum(len(r.running) for r in [replica, *others])
        return -(-(running + len(self.waiting)) // (len(others) + 1))

    @property
    def demand(self) -> bool:
        """Whether somebody wants it resident."""
        return bool(self.waiting or self.load_tickets or self.wanted)

    def resume(self, now: float) -> None:
        """A request comes: if it had none, take down for how long."""
        if not self.demand and not any(replica.running for replica in self.replicas):
            pause = now - self.idle_since
            self.pause_seconds = pause if self.pause_seconds == inf else (self.pause_seconds + pause) / 2

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

"""A request: what a node knows of it, and its life cycle.

Owns the struct and the table of legal transitions. Must not decide anything, nor change others.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from seallmd.core.host_kv import SavedKv
from seallmd.core.messages import Sampling
from seallmd.core.ranks import Tables
from seallmd.core.tiers import Tier

if TYPE_CHECKING:
    from seallmd.core.service import Replica


class IllegalTransition(RuntimeError):
    """A life cycle was asked for a step that its table does not have; nothing was changed."""


class Life(Enum):
    """A request's state."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


REQUEST_LIFE = {
    (Life.WAITING, "admit"): Life.RUNNING,
    (Life.RUNNING, "preempt"): Life.WAITING,
    (Life.RUNNING, "migrate"): Life.RUNNING,
    (Life.WAITING, "finish"): Life.DONE,
    (Life.RUNNING, "finish"): Life.DONE,
}


@dataclass(slots=True, eq=False)
class Request:
    """One request, from `Arrived` to its `Finish`.

    order: its seniority, by which memory is given: tier, then arrival. tokens: prompt and every generated
    token that was seen. replica: where it runs; tables: its block table on each rank there. scheduled,
    computed: tokens whose KV steps on their way, or done, have written. drawn: generated tokens, those still
    on their way included. inflight: rows in steps on their way. epoch: counts preemptions and migrations, so
    that rows of an earlier life are told apart. saved: its KV in host memory, while it waits or is landing.
    landing: it is on its way to `replica`, and does not run before its blocks there are filled. indexed: runs
    of blocks that others may share, and parents: what the next one follows, by rank. budget, attained:
    seconds of execution it may take before its rank falls, and that it has taken (SeaLLM's doubling budget).
    told: of the prompt's tokens, how many have been told what is wanted of them (log-probability, part in the
    pooled vector), or need not be, as the first one has no log-probability. tier: how urgent it is. failures:
    of steps with it, in a row; alone_until: after one, it has steps to itself until it has more tokens than
    that. trusted: rows of earlier epochs no longer count, not even their tokens. expected_wait: seconds that
    those before it seemed to take when it arrived.
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
    tier: Tier = "default"
    life: Life = Life.WAITING
    replica: Replica | None = None
    tables: Tables = ()
    saved: SavedKv | None = None
    landing: bool = False
    scheduled: int = 0
    computed: int = 0
    drawn: int = 0
    inflight: int = 0
    epoch: int = 0
    cached: int = 0
    indexed: int = 0
    parents: list[Hashable] = field(default_factory=list)
    announced: bool = False
    emitted: bool = False
    budget: float = 0.0
    attained: float = 0.0
    doublings: int = 0
    told: int = 1
    failures: int = 0
    alone_until: int = 0
    trusted: int = 0
    expected_wait: float = 0.0

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
    def reusable(self) -> int:
        """Leading tokens whose KV may come from elsewhere: what has to be predicted or pooled is run here."""
        if self.sampling.prompt_logprobs >= 0 and self.told < self.prompt:
            return self.told - 1
        if self.sampling.pooling == "mean":
            return self.told
        return len(self.tokens) - 1

    @property
    def deferred(self) -> bool:
        """Whether it is batch work, for the gaps that others leave."""
        return self.tier == "batch"

    @property
    def suspect(self) -> bool:
        """Whether a step with it failed, and it has not shown yet that it was not the cause."""
        return len(self.tokens) <= self.alone_until

    @property
    def runnable(self) -> bool:
        """Whether it is there, and another row makes sense: something is left to draw, or to run and pool."""
        left = self.drawn < self.max_tokens or (self.pools and self.pending > 0)
        return left and not self.landing

    @property
    def pools(self) -> bool:
        """Whether its prompt is pooled, and nothing drawn."""
        return self.max_tokens == 0

    @property
    def is_pooled(self) -> bool:
        """Whether that is done."""
        return self.pools and self.told == self.prompt

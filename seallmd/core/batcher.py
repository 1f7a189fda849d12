"""Forms one step of one replica: which requests, how many tokens of each, on which blocks.

Owns admission and the step's rows. Must not choose between replicas (`scheduler`). Memory is given by
seniority: rows are formed most senior request first, and a senior request that lacks blocks takes them from
idle services and then from the most junior running request of the device, whatever its service. So the most
senior one always gets on, and nothing ever waits for something that waits for it. Batch work is given what
rows and time the others leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from math import inf
from operator import attrgetter

from seallmd.core.estimate import begun
from seallmd.core.host_kv import SavedKv
from seallmd.core.messages import Admit, Row, Step
from seallmd.core.ranks import Tables
from seallmd.core.request import Life, Request
from seallmd.core.room import Room
from seallmd.core.scheduler import Admits
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import Device, NodeState, SentRow, SentStep
from seallmd.core.tiers import DEFERRED, YIELDING

_ORDER = attrgetter("order")
# Looking a member up in its Enum takes as long as a call, and these are asked for with every row.
_RUNNING, _RESIDENT, _DRAINING = Life.RUNNING, Stage.RESIDENT, Stage.DRAINING


class Batcher:
    """Forms steps on the shared state.

    room: makes some when blocks run out. admits: the policy's say in who is taken in.
    """

    def __init__(self, state: NodeState, room: Room, admits: Admits) -> None:
        self._state = state
        self._room = room
        self._admits = admits

    # ------------------------------------------------------------------------------- what could run

    def has_work(self, replica: Replica) -> bool:
        """Whether a step could be formed, memory permitting."""
        if replica.stage is not _RESIDENT and replica.stage is not _DRAINING:
            return False
        for request in replica.running.values():
            if request.runnable:
                return True
        waiting = self._state.services[replica.service].waiting
        return bool(waiting) and next(self._admissible(replica, waiting.values()), None) is not None

    def only_deferred(self, replica: Replica) -> bool:
        """Whether all that the replica could run is batch work."""
        for request in replica.running.values():
            if request.runnable and not request.deferred:
                return False
        waiting = self._state.services[replica.service].waiting
        first = next(self._admissible(replica, waiting.values()), None)
        return first is None or first.deferred

    def _admissible(self, replica: Replica, waiting: Iterable[Request]) -> Iterator[Request]:
        """Those of its service's waiting requests that a replica may take, most senior first."""
        draining = replica.stage is _DRAINING
        for request in waiting:
            if draining and request.order >= replica.admit_below:
                return  # nor any behind it
            if draining and not replica.lets_in(request.order):
                continue
            # A preempted request whose last rows are still on their way would be announced without the
            # token that they draw.
            if (
                request.inflight == 0
                and not self._awaits_leader(request)
                and not _awaits_copy(request, replica)
            ):
                yield request

    def _awaits_leader(self, request: Request) -> bool:
        """Whether another request is computing the prompt that this one will share."""
        leader = self._state.requests.get(request.leader)
        return leader is not None and len(leader.tokens) == leader.prompt

    # ------------------------------------------------------------------------------- one step

    def form(self, replica: Replica) -> list[tuple[Device, Step]]:
        """The replica's next step for each of its devices, with its memory taken; empty if none can run."""
        suspects = self._state.services[replica.service].suspects
        return (suspects and self._form_for_suspect(replica)) or self._form_for_all(replica)

    def _form_for_suspect(self, replica: Replica) -> list[tuple[Device, Step]]:
        """A step for one request alone that was in a step that failed, if there is such a request."""
        service = self._state.services[replica.service]
        service.suspects &= self._state.requests.keys()
        if not service.suspects:
            return []
        former = _StepFormer(self._state, self._room, self._admits, replica)
        running = [r for r in replica.running.values() if r.suspect and r.runnable]
        if running:
            former.add(min(running, key=lambda r: r.order))
            return former.steps()
        for request in self._admissible(replica, service.waiting.values()):
            if request.suspect:
                former.admit(request)
                break
        return former.steps()

    def _form_for_all(self, replica: Replica) -> list[tuple[Device, Step]]:
        former = _StepFormer(self._state, self._room, self._admits, replica)
        rows = sorted(replica.running.values(), key=_ORDER)
        # A copy: who is admitted waits no longer. There may be thousands, of which few are looked at.
        queue = list(self._state.services[replica.service].waiting.values())
        admitting = True
        # Whoever waits gets in before what yields to it gets its rows: what has a row keeps its memory.
        for tiers, running, waiting in _by_yielding(rows, queue):
            if tiers == DEFERRED:
                former.bound_deferred()
            for request in running:
                if not request.suspect:
                    former.add(request)
            if waiting and admitting:
                admitting = self._admit(former, replica, waiting)
        return former.steps()

    def _admit(self, former: _StepFormer, replica: Replica, waiting: list[Request]) -> bool:
        """Take in those of the waiting that the step has place for. False: none behind is to be tried."""
        if former.has_place:
            for request in self._admissible(replica, waiting):
                if not request.suspect and not former.admit(request):
                    return False
        return True


class _StepFormer:
    """One step in the making."""

    def __init__(self, state: NodeState, room: Room, admits: Admits, replica: Replica) -> None:
        self._state = state
        self._room = room
        self._policy_admits = admits
        self._group = state.group(replica)
        self._replica = replica
        self._ranks = replica.ranks
        self._service: Service = state.services[replica.service]
        self._rows: list[dict[int, Row]] = [{} for _ in self._group]  # by rank and request
        self._sent: list[SentRow] = []
        self._admits: list[Admit] = []
        limits = state.settings.policy
        self._rows_left = limits.max_rows
        self._prefill_tokens: int | None = None  # that are left; None: nobody has asked
        self._slowdown = limits.batch_slowdown
        self._most_seconds = inf
        self._tokens = self._context = self._drawing = 0

    def _prefill_left(self) -> int:
        """Tokens of prompts that the step has place for. Most steps only decode, and nobody asks."""
        if self._prefill_tokens is None:
            # Decoding requests wait for one token each: they get theirs before prefill takes the rest.
            limits, given = self._state.settings.policy, self._rows[0]
            decoding = len(given)
            for request in self._replica.running.values():
                decoding += request.pending == 1 and request.runnable and request.id not in given
            self._prefill_tokens = max(1, limits.step_tokens - min(decoding, limits.max_rows))
        return self._prefill_tokens

    def bound_deferred(self) -> None:
        """The rows so far are not to wait much longer for those that follow, which are batch work."""
        if self._sent:
            self._most_seconds = self._slowdown * self._seconds_with(0, 0, draws=False)

    def _seconds_with(self, count: int, start: int, *, draws: bool) -> float:
        """How long the step is going to take with one row more, of `count` tokens after `start`."""
        assert self._service.profile is not None
        tokens, context = self._tokens + count, self._context + start + count
        return self._service.profile.costs.predict(tokens, context, self._drawing + draws)

    def _within_bound(self, count: int, start: int, pending: int) -> int:
        """As many of the next `count` of a request's `pending` tokens as the step has time for; 0 = none."""
        if self._most_seconds == inf:
            return count
        while count and self._seconds_with(count, start, draws=count == pending) > self._most_seconds:
            count //= 2
        return count

    def add(self, request: Request) -> None:
        """Give a running request its row, if it is still running and its memory can be had."""
        if request.life is not _RUNNING or not request.runnable or not self._rows_left:
            return
        pending = request.pending
        count = 1 if pending == 1 else min(pending, self._prefill_left())
        count = self._within_bound(count, request.scheduled, pending)
        fresh = self._service.blocks_for(request.scheduled + count) - len(request.tables[0])
        if not count:
            return
        if not request.announced:  # it has come from another replica
            self._add_landed(request, count, pending, max(0, fresh))
        elif fresh <= 0:  # most tokens go where the last one went
            self._append(request, count, pending)
        elif self._had(fresh, request):
            self._append(request, count, pending, self._take(request, fresh))

    def _add_landed(self, request: Request, count: int, pending: int, fresh: int) -> None:
        """Its first row here: the workers know neither the request nor its blocks."""
        if self._had(fresh, request):
            self._take(request, fresh)
            self._announce(request)
            self._append(request, count, pending, request.tables)

    @property
    def has_place(self) -> bool:
        """Whether a request could be taken in, as far as the step's size goes."""
        return bool(self._rows_left and self._prefill_left())

    def admit(self, request: Request) -> bool:
        """Take a waiting request in. False: none behind it is to be tried either."""
        if not self.has_place:
            return False
        if self._belongs_elsewhere(request):
            return True
        if self._leaves_to_others(request):
            return self._most_kv > self._most_kv_of_others  # one behind it may have no other place
        if any(self._state.claimed(device, request.order) for device in self._group):
            return False  # somebody senior waits for the memory that this one would take
        admits, replica = self._policy_admits, self._replica
        if not all(admits(self._state, device, replica, request) for device in self._group):
            return False
        shared = self._shared_prefix(request)  # held at once, so that making room cannot reclaim it
        done = len(shared[0]) // self._service.run_blocks * self._service.run_tokens
        saved = self._worth_restoring(request.saved, done)
        if saved is not None:
            done = saved.tokens
        pending = len(request.tokens) - done
        count = self._within_bound(min(pending, self._prefill_left()), done, pending)
        if not count:
            self._ranks.release(shared)
            return False
        fresh = self._service.blocks_for(done + count) - len(shared[0])
        margin = len(self._replica.running) * self._service.run_blocks  # the next tokens of those that run
        if not self._has_room(fresh, request, margin):
            self._ranks.release(shared)
            for device in self._group:
                self._state.claim(device, request.order, request.service)
            return False
        self._enter(request, shared)
        taken = self._take(request, fresh)
        if saved is not None:
            self._state.restore(request, saved, skip=len(shared[0]))
        self._state.drop_saved(request)
        request.scheduled = request.computed = done
        if not request.emitted:
            request.cached = done
        self._append(request, count, pending, _joined(shared, taken))
        return True

    def _belongs_elsewhere(self, request: Request) -> bool:
        """Whether a request has outgrown this group, or could outgrow it but not another's."""
        service, state = self._service, self._state
        if service.blocks_for(len(request.tokens) + 1) > self._most_kv:
            state.stranded.add(service.name)
            return True
        if len(service.replicas) == 1:
            return False
        blocks = service.blocks_for(request.prompt + request.max_tokens)
        return self._most_kv < blocks <= max(map(state.most_kv_blocks_of, service.replicas))

    def _leaves_to_others(self, request: Request) -> bool:
        """Whether this replica runs its part of the requests, and another could run this one."""
        if len(self._replica.running) < self._service.share(self._replica):
            return False
        return self._service.blocks_for(request.prompt + request.max_tokens) <= self._most_kv_of_others

    @cached_property
    def _most_kv(self) -> int:
        """KV blocks that the replica could have on each of its devices."""
        return self._state.most_kv_blocks_of(self._replica)

    @cached_property
    def _most_kv_of_others(self) -> int:
        """The same for the roomiest of the others that take requests."""
        others = self._service.others(self._replica)
        return max(map(self._state.most_kv_blocks_of, others), default=0)

    def _shared_prefix(self, request: Request) -> Tables:
        if not self._state.settings.policy.prefix_reuse:
            return tuple([] for _ in self._group)
        service, tokens = self._service, request.tokens[: request.reusable]
        return self._ranks.share_prefix(
            self._service.root_of(request), tokens, service.run_tokens, service.run_blocks
        )

    def _worth_restoring(self, saved: SavedKv | None, shared_tokens: int) -> SavedKv | None:
        """KV in host memory, if this group can read it and it is more than the arena still has."""
        if saved is None or saved.tokens <= shared_tokens:
            return None
        return saved if saved.within_reach(self._replica.devices) else None

    def _has_room(self, blocks: int, request: Request, margin: int) -> bool:
        """Room for an admission, without pushing out what runs but yielding tiers; alone, it may take all."""
        for device in self._group:
            arena = device.arena
            assert arena is not None
            if arena.available < blocks + margin:
                self._room.evict_idle(device, blocks + margin, keep=request.service)
            self._room.displace(device, blocks + margin, request, kept=self._rows[0])
        if self._ranks.available >= blocks + margin:
            return True
        return self._alone() and self._had(blocks, request)

    def _alone(self) -> bool:
        return not any(replica.running for device in self._group for replica in device.replicas.values())

    def _enter(self, request: Request, shared: Tables) -> None:
        self._service.dequeue(request)
        begun(self._service, request, self._state.now)
        request.move("admit")
        request.replica = self._replica
        request.tables = tuple(list(table) for table in shared)
        request.indexed = len(shared[0]) // self._service.run_blocks
        request.parents = self._ranks.parents(self._service.root_of(request), shared)
        self._replica.running[request.id] = request
        self._announce(request)

    def _announce(self, request: Request) -> None:
        """Have the workers know a request before its first row."""
        request.announced = True
        tokens = tuple(request.tokens)
        self._admits.append(Admit(request.id, tokens, request.prompt, request.sampling, request.told))

    def _had(self, blocks: int, request: Request) -> bool:
        """Whether a request can have blocks on every rank now, from its juniors if need be."""
        if blocks <= self._ranks.available:
            return True
        # One rank at a time: making room on the next may end the request itself.
        return (
            all(
                self._room.make_room(device, blocks, request, kept=self._rows[0])
                for device in self._group
                if request.id in self._state.requests
            )
            and blocks <= self._ranks.available
        )

    def _take(self, request: Request, blocks: int) -> Tables:
        taken = self._ranks.take(blocks)
        for table, more in zip(request.tables, taken, strict=True):
            table += more
        return taken

    def _append(
        self, request: Request, count: int, pending: int, fresh: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Note a row of the next `count` of a request's `pending` tokens.

        fresh: blocks, by rank, that its table has gained for it, if any.
        """
        start = request.scheduled
        sample = count == pending and not request.pools
        if fresh is None:
            row = Row(request.id, start, count, sample)
            for rows in self._rows:
                rows[request.id] = row
        else:
            for rows, blocks in zip(self._rows, fresh, strict=True):
                rows[request.id] = Row(request.id, start, count, sample, tuple(blocks))
        self._sent.append(SentRow(request, request.epoch, count, sample))
        self._rows_left -= 1
        if pending > 1:
            self._prefill_tokens = self._prefill_left() - count
        self._drawing += sample
        self._tokens += count
        self._context += start + count
        request.scheduled = start + count
        request.drawn += sample
        request.inflight += 1

    def steps(self) -> list[tuple[Device, Step]]:
        """The step of each device, noted as on its way; nothing when it has no rows."""
        if not self._sent:
            return []
        state, replica = self._state, self._replica
        state.steps += 1
        work = self._drawing, self._tokens, self._context
        sent = SentStep(state.steps, replica.service, replica.copy, replica.leader, self._sent, *work)
        replica.used, replica.served = state.now, True
        self._service.changed()
        admits = tuple(self._admits)
        steps = []
        for device, rows in zip(self._group, self._rows, strict=True):
            device.inflight[sent.id] = sent
            device.last_served = replica.service
            steps.append((device, Step(sent.id, replica.service, admits, tuple(rows.values()))))
        return steps


def _awaits_copy(request: Request, replica: Replica) -> bool:
    """Whether its KV is still on its way to host memory: until then only its sender may read it."""
    saved = request.saved
    return saved is not None and not saved.copied and saved.devices != replica.devices


def _joined(first: Tables, second: Tables) -> Tables:
    """Rank by rank, one after the other."""
    return tuple([*a, *b] for a, b in zip(first, second, strict=True))


def _by_yielding(
    running: list[Request], waiting: list[Request]
) -> list[tuple[tuple[str, ...], list[Request], list[Request]]]:
    """Both in order of seniority, cut where tiers begin that yield to those before."""
    first = YIELDING[0]
    if (not running or running[-1].tier in first) and (not waiting or waiting[-1].tier in first):
        return [(first, running, waiting)]  # as in most steps
    return [
        (tiers, [r for r in running if r.tier in tiers], [r for r in waiting if r.tier in tiers])
        for tiers in YIELDING
    ]

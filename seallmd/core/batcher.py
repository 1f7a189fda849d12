"""Forms one step of one replica: which requests, how many tokens of each, on which blocks.

Owns admission and the batch. Must not choose between replicas (`scheduler`). Memory is given by seniority:
rows are formed most senior request first, and a senior request that lacks blocks takes them from idle
services and then from the most junior running request of the device, whatever its service. So the most
senior one always gets on, and nothing ever waits for something that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from seallmd.core.arena import Arena
from seallmd.core.messages import Admit, Row, Step
from seallmd.core.room import Room
from seallmd.core.state import Device, Life, NodeState, Replica, Request, SentRow, SentStep, Service, Stage


class Batcher:
    """Forms steps on the shared state. `room` is asked to make some when blocks run out."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._room = room

    # ------------------------------------------------------------------------------- what could run

    def has_work(self, replica: Replica) -> bool:
        """Whether a step could be formed, memory permitting."""
        if replica.stage not in (Stage.RESIDENT, Stage.DRAINING):
            return False
        if any(request.drawn < request.max_tokens for request in replica.running.values()):
            return True
        return next(self._admissible(replica), None) is not None

    def _admissible(self, replica: Replica) -> Iterator[Request]:
        """Waiting requests that this replica may take, most senior first."""
        for request in self._state.services[replica.service].waiting.values():
            if replica.stage is Stage.DRAINING and request.order >= replica.admit_below:
                return
            # A preempted request whose last rows are still on their way would be announced without the
            # token that they draw.
            if request.inflight == 0 and not self._awaits_leader(request):
                yield request

    def _awaits_leader(self, request: Request) -> bool:
        """Whether another request is computing the prompt that this one will share."""
        leader = self._state.requests.get(request.leader)
        return leader is not None and len(leader.tokens) == leader.prompt

    # ------------------------------------------------------------------------------- one step

    def form(self, device: Device, replica: Replica) -> Step | None:
        """The replica's next step, with all its memory taken; None when nothing can run now."""
        service = self._state.services[replica.service]
        former = _StepFormer(self._state, self._room, device, replica, service)
        for request in sorted(replica.running.values(), key=lambda r: r.order):
            former.add(request)
        for request in list(self._admissible(replica)):
            if not former.admit(request):
                break
        return former.step()


class _StepFormer:
    """One step in the making."""

    def __init__(
        self, state: NodeState, room: Room, device: Device, replica: Replica, service: Service
    ) -> None:
        assert device.arena is not None
        self._state = state
        self._room = room
        self._device = device
        self._replica = replica
        self._service = service
        self._arena: Arena = device.arena
        self._block_tokens = service.block_tokens
        self._rows: dict[int, Row] = {}
        self._sent: list[SentRow] = []
        self._admits: list[Admit] = []
        limits = state.settings.scheduler
        self._rows_left = limits.max_rows
        # Decoding requests wait for one token each: they get theirs before prefill takes the rest.
        decoding = sum(r.runnable and r.pending == 1 for r in replica.running.values())
        self._prefill_left = max(1, limits.step_tokens - min(decoding, limits.max_rows))

    def add(self, request: Request) -> None:
        """Give a running request its row, if it is still running and its memory can be had."""
        if request.life is not Life.RUNNING or not request.runnable or not self._rows_left:
            return
        count = 1 if request.pending == 1 else min(request.pending, self._prefill_left)
        fresh = max(0, self._blocks_for(request.scheduled + count) - len(request.blocks))
        if count and self._had(fresh, request):
            self._append(request, count, self._take(request, fresh))

    def admit(self, request: Request) -> bool:
        """Take a waiting request in. False: none behind it is to be tried either."""
        if not self._rows_left or not self._prefill_left:
            return False
        if len(self._replica.running) >= self._service.share(self._replica):
            return False  # the other replicas' part
        if self._belongs_elsewhere(request):
            return True
        device = self._device
        if self._state.claimed(device, request.order):
            return False  # somebody senior waits for the memory that this one would take
        shared = self._shared_prefix(request)
        for block in shared:  # first, so that making room cannot reclaim them
            self._arena.share(block)
        done = len(shared) * self._block_tokens
        count = min(len(request.tokens) - done, self._prefill_left)
        fresh = self._blocks_for(done + count) - len(shared)
        margin = len(self._replica.running)  # the next tokens of those that run already
        if not self._has_room(fresh, request, margin):
            self._arena.release(shared)
            self._state.claim(device, request.order, request.service)
            return False
        self._enter(request, shared)
        self._append(request, count, [*shared, *self._take(request, fresh)])
        return True

    def _belongs_elsewhere(self, request: Request) -> bool:
        """Whether a request could outgrow this device (pinned services keep their part) but not another's."""
        blocks = self._blocks_for(request.prompt + request.max_tokens)
        state, service = self._state, self._service
        rooms = {r.device: state.most_kv_blocks(state.devices[r.device], service) for r in service.replicas}
        return rooms[self._device.index] < blocks <= max(rooms.values())

    def _shared_prefix(self, request: Request) -> list[int]:
        if not self._state.settings.scheduler.prefix_reuse:
            return []
        # The last token is always computed: its logits are wanted.
        return self._arena.prefix.match(request.root, request.tokens[:-1], self._block_tokens)

    def _has_room(self, blocks: int, request: Request, margin: int) -> bool:
        """Room for an admission, without pushing out anything that runs; alone, it may take all there is."""
        if self._arena.available >= blocks + margin:
            return True
        self._room.evict_idle(self._device, blocks + margin, keep=request.service)
        if self._arena.available >= blocks + margin:
            return True
        return self._alone() and self._room.make_room(self._device, blocks, request, kept=self._rows)

    def _alone(self) -> bool:
        return not any(replica.running for replica in self._device.replicas.values())

    def _enter(self, request: Request, shared: list[int]) -> None:
        del self._service.waiting[request.order]
        request.move("admit")
        request.device = self._device.index
        request.blocks = list(shared)
        request.scheduled = request.computed = len(shared) * self._block_tokens
        request.indexed = len(shared)
        request.parent = self._arena.prefix.parent_of(shared[-1]) if shared else request.root
        request.announced = True
        if not request.emitted:
            request.cached = request.scheduled
        self._replica.running[request.id] = request
        self._admits.append(Admit(request.id, tuple(request.tokens), request.prompt, request.sampling))

    def _had(self, blocks: int, request: Request) -> bool:
        """Whether a running request can have blocks now, from its juniors if need be."""
        return blocks <= self._arena.available or self._room.make_room(
            self._device, blocks, request, kept=self._rows
        )

    def _take(self, request: Request, blocks: int) -> list[int]:
        taken = self._arena.take(blocks)
        request.blocks += taken
        return taken

    def _append(self, request: Request, count: int, blocks: list[int]) -> None:
        sample = count == request.pending
        self._rows[request.id] = Row(request.id, request.scheduled, count, sample, tuple(blocks))
        self._sent.append(SentRow(request, request.epoch, count, sample))
        self._rows_left -= 1
        if request.pending > 1:
            self._prefill_left -= count
        request.scheduled += count
        request.drawn += sample
        request.inflight += 1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def step(self) -> Step | None:
        """The step, noted as on its way; None when it has no rows."""
        if not self._rows:
            return None
        state, device = self._state, self._device
        state.steps += 1
        rows = self._rows.values()
        tokens, context = sum(row.count for row in rows), sum(row.start + row.count for row in rows)
        device.inflight[state.steps] = SentStep(state.steps, self._service.name, self._sent, tokens, context)
        device.last_served = self._service.name
        self._replica.used, self._replica.served = state.now, True
        return Step(state.steps, self._service.name, tuple(self._admits), tuple(self._rows.values()))

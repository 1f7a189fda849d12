"""A node in virtual time: the daemon's own `Node`, with workers and a host process that are made up.

Owns the clock (a heap of things to come), simulated devices that carry out messages in order and take time
for it, and the faults that can be done to them. Must not decide anything: policy is `core.node`'s. The
devices hold contents, not only counts: each KV slot remembers which prefix was written into it, each block
of weights whose they are, and a step that reads anything else raises `Corruption`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.node import Node
from seallmd.core.settings import NodeSettings


class Corruption(AssertionError):
    """A step read memory that does not hold what its request or its model wrote."""


@dataclass(frozen=True)
class Costs:
    """How long things take, in seconds. copy and read: per byte."""

    step: float = 0.01
    token: float = 0.0002
    copy_byte: float = 1e-10
    read_byte: float = 5e-10
    probe: float = 0.2
    start: float = 2.0


@dataclass
class _Known:
    """A request as a worker knows it. digests[p] stands for tokens[: p + 1]."""

    service: str
    tokens: list[int]
    digests: list[int]
    table: list[int] = field(default_factory=list)
    done: int = 0

    def append(self, token: int) -> None:
        before = self.digests[-1] if self.digests else hash(self.service)
        self.tokens.append(token)
        self.digests.append(hash((before, token)))


def next_token(digest: int, vocab: int) -> int:
    """What the made-up model draws after a prefix."""
    return (digest * 2654435761 >> 7) % vocab


def expected_output(service: str, prompt: tuple[int, ...], count: int, vocab: int) -> list[int]:
    """What a request must yield, whatever is done to it meanwhile (up to its stop ids)."""
    known = _Known(service, [], [])
    for token in prompt:
        known.append(token)
    for _ in range(count):
        known.append(next_token(known.digests[-1], vocab))
    return known.tokens[len(prompt) :]


class SimDevice:
    """One worker: carries messages out in order; copies go on beside the steps."""

    def __init__(self, world: World, index: int, arena_bytes: int) -> None:
        self._world = world
        self.index = index
        self.arena_bytes = arena_bytes
        self.alive = False
        self.generation = 0
        self.fail_steps = 0
        self.fail_copies = 0
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[msg.ToWorker] = deque()
        self._busy = False
        self._memory: dict[int, object] = {}
        self._weights: dict[str, list[tuple[int, int]]] = {}
        self._copying: dict[str, int] = {}
        self._requests: dict[int, _Known] = {}

    def start(self) -> None:
        """The process is up, with an empty arena."""
        self._reset()
        self.alive = True
        self._world.happen(ev.WorkerUp(self.index, f"sim {self.index}", self.arena_bytes))

    def kill(self, restart_after: float) -> None:
        """The process is gone; another comes up later."""
        if not self.alive:
            return
        self.alive = False
        self.generation += 1
        self._world.happen(ev.WorkerLost(self.index, "killed"))
        self._world.after(restart_after, self.start)

    def receive(self, message: msg.ToWorker) -> None:
        """A message from the daemon."""
        if self.alive:
            self._queue.append(message)
            self._work()

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        generation = self.generation
        self._world.after(seconds, lambda: do() if self.generation == generation else None)

    def _say(self, message: msg.CopyDone | msg.CopyFailed | msg.StepDone | msg.StepFailed) -> None:
        self._world.happen(ev.FromDevice(self.index, message))

    def _work(self) -> None:
        while self._queue and not self._busy:
            message = self._queue.popleft()
            match message:
                case msg.Step():
                    self._step(message)
                case msg.CopyIn():
                    self._copy_in(message)
                case msg.DropWeights(service):
                    self._copying.pop(service, None)
                    self._weights.pop(service, None)
                case msg.MoveBlocks(src, dst):
                    self._move(src, dst)
                case msg.Forget(requests):
                    for request in requests:
                        self._requests.pop(request, None)
                case _:
                    pass

    # --------------------------------------------------------------------------------- messages

    def _copy_in(self, message: msg.CopyIn) -> None:
        unit = self._world.block_bytes
        runs = [(e.arena_at // unit, -(-e.bytes_ // unit)) for e in message.extents]
        for start, blocks in runs:
            for block in range(start, start + blocks):
                self._memory[block] = (message.service, message.copy)
        self._copying[message.service] = message.copy

        def end() -> None:
            if self._copying.get(message.service) != message.copy:
                return  # dropped meanwhile
            del self._copying[message.service]
            if self.fail_copies:
                self.fail_copies -= 1
                self._say(msg.CopyFailed(message.service, "made to fail", message.copy))
            else:
                self._weights[message.service] = runs
                self._say(msg.CopyDone(message.service, 0.0, message.copy))

        total = sum(e.bytes_ for e in message.extents)
        self._later(total * self._world.costs.copy_byte, end)

    def _move(self, src: tuple[int, ...], dst: tuple[int, ...]) -> None:
        for source, target in zip(src, dst, strict=True):
            self._memory[target] = self._memory.pop(source)
        renamed = dict(zip(src, dst, strict=True))
        for known in self._requests.values():
            known.table = [renamed.get(block, block) for block in known.table]

    def _step(self, step: msg.Step) -> None:
        self._busy = True
        tokens = sum(row.count for row in step.rows)
        costs = self._world.costs
        self._later(costs.step + costs.token * tokens, lambda: self._end_step(step))

    def _end_step(self, step: msg.Step) -> None:
        self._busy = False
        if self.fail_steps:
            self.fail_steps -= 1
            for row in step.rows:
                self._requests.pop(row.request, None)
            self._say(msg.StepFailed(step.step, "made to fail"))
        else:
            self._check_weights(step.service)
            for admit in step.admit:
                self._requests[admit.request] = self._admitted(step.service, admit)
            drawn = [self._run(row) for row in step.rows]
            self._say(msg.StepDone(step.step, tuple(t for t in drawn if t is not None), 0.0))
        self._work()

    def _admitted(self, service: str, admit: msg.Admit) -> _Known:
        known = _Known(service, [], [])
        for token in admit.tokens:
            known.append(token)
        return known

    def _check_weights(self, service: str) -> None:
        if service not in self._weights:
            raise Corruption(f"a step of {service}, which is not resident")
        for start, blocks in self._weights[service]:
            for block in range(start, start + blocks):
                owner = self._memory.get(block)
                if not isinstance(owner, tuple) or owner[0] != service:
                    raise Corruption(f"block {block} of {service}'s weights holds {owner!r:.60}")

    def _run(self, row: msg.Row) -> int | None:
        known = self._requests.get(row.request)
        if known is None:  # an earlier step of it failed
            return 0 if row.sample else None
        size = self._world.block_tokens(known.service)
        known.table += row.blocks
        # Blocks that were shared hold their part already; a row starts behind it.
        if row.start + row.count > len(known.tokens):
            raise Corruption(f"request {row.request} runs tokens that nobody knows")
        for position in range(row.start, row.start + row.count):
            block = known.table[position // size]
            slots = self._memory.get(block)
            if not isinstance(slots, list) or position % size == 0:
                slots = self._memory[block] = list[object]([None] * size)
            slots[position % size] = known.digests[position]
        for position in range(row.start + row.count):
            slots = self._memory.get(known.table[position // size])
            if not isinstance(slots, list) or slots[position % size] != known.digests[position]:
                raise Corruption(f"request {row.request} position {position} was overwritten")
        known.done = row.start + row.count
        if not row.sample:
            return None
        token = next_token(known.digests[known.done - 1], self._world.vocab)
        known.append(token)
        return token


HostAnswer = msg.Probed | msg.ProbeFailed | msg.ImageReady | msg.ImageFailed


class SimHost:
    """The host process: probes and reads, one job after another."""

    def __init__(self, world: World, shapes: dict[str, msg.ModelShape | str]) -> None:
        self._world = world
        self._shapes = shapes
        self._free_at = 0.0
        self.generation = 0
        self.alive = False
        self.fail_images = 0

    def start(self) -> None:
        """The process is up and holds no image."""
        self.alive, self._free_at = True, self._world.now
        self._world.happen(ev.HostUp())

    def kill(self, restart_after: float) -> None:
        """The process is gone; another comes up later."""
        if not self.alive:
            return
        self.alive = False
        self.generation += 1
        self._world.happen(ev.HostLost("killed"))
        self._world.after(restart_after, self.start)

    def receive(self, message: msg.ToHost) -> None:
        """A message from the daemon."""
        if not self.alive:
            return
        match message:
            case msg.Probe(service):
                shape = self._shapes[service]
                answer: msg.Probed | msg.ProbeFailed = (
                    msg.ProbeFailed(service, shape)
                    if isinstance(shape, str)
                    else msg.Probed(service, f"/models/{service}", shape)
                )
                self._answer(self._world.costs.probe, lambda: answer)
            case msg.BuildImage(service):
                shape = self._shapes[service]
                assert isinstance(shape, msg.ModelShape)
                bytes_ = shape.weights_bytes
                self._answer(bytes_ * self._world.costs.read_byte, lambda: self._built(service, bytes_))
            case _:
                pass

    def _built(self, service: str, bytes_: int) -> msg.ImageReady | msg.ImageFailed:
        if self.fail_images:
            self.fail_images -= 1
            return msg.ImageFailed(service, "made to fail")
        return msg.ImageReady(service, f"/image/{service}", bytes_, 0.0)

    def _answer(self, seconds: float, make: Callable[[], HostAnswer]) -> None:
        self._free_at = max(self._free_at, self._world.now) + seconds
        generation = self.generation

        def say() -> None:
            if self.generation == generation:
                self._world.happen(ev.FromHostProcess(make()))

        self._world.after(self._free_at - self._world.now, say)


class World:
    """Drives a node through virtual time. `observe` sees every (event, actions) pair."""

    def __init__(
        self,
        settings: NodeSettings,
        shapes: dict[str, msg.ModelShape | str],
        arena_bytes: tuple[int, ...],
        costs: Costs | None = None,
        observe: Callable[[ev.Event, list[ev.Action]], None] | None = None,
    ) -> None:
        self.now = 0.0
        self.costs = costs or Costs()
        self.block_bytes = settings.block_bytes
        self.vocab = min((s.vocab for s in shapes.values() if isinstance(s, msg.ModelShape)), default=2)
        self.node = Node(settings)
        self.host = SimHost(self, shapes)
        self.devices = [SimDevice(self, i, size) for i, size in enumerate(arena_bytes)]
        self.history: list[tuple[float, ev.Event]] = []
        self._shapes = shapes
        self._observe = observe
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._tick_at: float | None = None
        self._pending: deque[ev.Event] = deque()
        self._handling = False

    def start(self) -> None:
        """Start every process; they come up after `costs.start`."""
        for start in (self.host.start, *(device.start for device in self.devices)):
            self.after(self.costs.start, start)

    def block_tokens(self, service: str) -> int:
        """Tokens of one block of a service."""
        shape = self._shapes[service]
        assert isinstance(shape, msg.ModelShape)
        return self.block_bytes // shape.kv_bytes_per_token

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, do))

    def happen(self, event: ev.Event) -> None:
        """An event reaches the node now; what it wants done is done."""
        self._pending.append(event)
        if self._handling:
            return  # a device answered within the same instant: after the actions at hand
        self._handling = True
        while self._pending:
            event = self._pending.popleft()
            self.history.append((self.now, event))
            actions = self.node.handle(event, self.now)
            if self._observe is not None:
                self._observe(event, actions)
            for action in actions:
                if isinstance(action, ev.ToDevice):
                    self.devices[action.device].receive(action.message)
                elif isinstance(action, ev.ToHostProcess):
                    self.host.receive(action.message)
        self._handling = False
        self._schedule_tick()

    def _schedule_tick(self) -> None:
        at = self.node.next_wakeup()
        if at is None or (self._tick_at is not None and self.now < self._tick_at <= at):
            return
        self._tick_at = at
        self.after(at - self.now, lambda: self.happen(ev.Tick()))

    def step(self) -> bool:
        """Go to the next thing that happens. False when nothing is to come."""
        if not self._heap:
            return False
        self.now, _, do = heapq.heappop(self._heap)
        do()
        return True

    def run(self, until: float | None = None) -> None:
        """Go on until nothing is to come, or to a time."""
        while self._heap and (until is None or self._heap[0][0] <= until):
            self.step()
        if until is not None:
            self.now = max(self.now, until)

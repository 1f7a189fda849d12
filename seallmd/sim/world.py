"""A node in virtual time: the daemon's own `Node`, with workers and a host process that are made up.

Owns the clock (a heap of things to come), the simulated host process, and the way of events to the node and
of its messages to devices. Must not decide anything: policy is `core.node`'s. In its checking mode, the
default, devices hold contents and a step that reads anything but what was written raises `Corruption`; with
`lengths` they only take time, which is what experiments need.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.node import Node
from seallmd.core.placement import place
from seallmd.core.settings import NodeSettings
from seallmd.core.shapes import ModelShape
from seallmd.sim.contention import Contention
from seallmd.sim.contents import Contents, Corruption, expected_output
from seallmd.sim.device import Blank, Memory, SimDevice, Span
from seallmd.sim.group import Meetings
from seallmd.sim.timing import Costs, Timing

__all__ = ["Corruption", "Costs", "SimHost", "World", "expected_output"]

PLAN_SECONDS = 0.2  # that a search takes
HostAnswer = msg.Probed | msg.ProbeFailed | msg.ImageReady | msg.ImageFailed


class SimHost:
    """The host process: probes and reads, one job after another."""

    def __init__(self, world: World, shapes: dict[str, ModelShape | str]) -> None:
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
                self._answer(self._world.timing.probe, lambda: answer)
            case msg.BuildImage(service):
                shape = self._shapes[service]
                assert isinstance(shape, ModelShape)
                bytes_ = shape.weights_bytes
                self._answer(self._world.timing.read(bytes_), lambda: self._built(service, bytes_))
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
    """Drives a node through virtual time. `observe` sees every (event, actions) pair.

    timing: of everything that takes time. lengths: tokens of prompt and output together, by request: devices
    then draw `device.STOP` when a request is that long, and check nothing (None: the checking mode). The
    caller adds to it as requests arrive. on_span: told of each step and copy that ended. keep_history: keep
    every event, to run it again.
    """

    def __init__(
        self,
        settings: NodeSettings,
        shapes: dict[str, ModelShape | str],
        arena_bytes: tuple[int, ...],
        timing: Timing | None = None,
        observe: Callable[[ev.Event, list[ev.Action]], None] | None = None,
        *,
        lengths: dict[int, int] | None = None,
        on_span: Callable[[Span], None] | None = None,
        keep_history: bool = True,
    ) -> None:
        self.now = 0.0
        self.search = place  # tests may look for other plans
        self.timing: Timing = timing or Costs()
        self.node = Node(settings)
        self.host = SimHost(self, shapes)
        known = {name: shape for name, shape in shapes.items() if isinstance(shape, ModelShape)}
        vocab = min((shape.vocab for shape in known.values()), default=2)
        unit = settings.block_bytes
        runs = {name: self._run_of(name) for name in known}

        host: dict[tuple[int, int], list[object]] = {}

        def memory(index: int) -> Memory:
            return Contents(unit, runs, vocab, index, host) if lengths is None else Blank(lengths)

        meetings = Meetings()
        slowdown = {index: self.timing.contention(index) for index in range(len(arena_bytes))}
        contention = Contention(self, {index: share for index, share in slowdown.items() if share})
        self.devices = [
            SimDevice(
                *(self, index, size, self.timing, memory(index), meetings, contention),
                *(on_span, unit, settings.threads),
            )
            for index, size in enumerate(arena_bytes)
        ]
        self.history: list[tuple[float, ev.Event]] = []
        self._keep_history = keep_history
        self._observe = observe
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._tick_at: float | None = None
        self._pending: deque[ev.Event] = deque()
        self._handling = False

    def _run_of(self, service: str) -> Callable[[], tuple[int, int]]:
        """Tokens and blocks of a run of a service's KV, which follow from its ranks."""

        def run() -> tuple[int, int]:
            known = self.node.state.services[service]
            return known.run_tokens, known.run_blocks

        return run

    def start(self) -> None:
        """Start every process; they come up after `timing.start`."""
        for start in (self.host.start, *(device.start for device in self.devices)):
            self.after(self.timing.start, start)

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
            if self._keep_history:
                self.history.append((self.now, event))
            actions = self.node.handle(event, self.now)
            if self._observe is not None:
                self._observe(event, actions)
            for action in actions:
                if type(action) is ev.Emit:
                    continue  # most are
                if isinstance(action, ev.ToDevice):
                    self.devices[action.device].receive(action.message)
                elif isinstance(action, ev.ToHostProcess):
                    self.host.receive(action.message)
                elif isinstance(action, ev.SearchPlan):
                    self.after(PLAN_SECONDS, partial(self._search, action))
        self._handling = False
        self._schedule_tick()

    def _search(self, wanted: ev.SearchPlan) -> None:
        self.happen(ev.PlanFound(self.search(wanted.demands, wanted.machine, wanted.near)))

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
        at, _, do = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        do()
        return True

    def stand_still(self, seconds: float) -> None:
        """Time passes without the daemon, as on a suspended machine: what came meanwhile comes late."""
        self.now += seconds

    def run(self, until: float | None = None) -> None:
        """Go on until nothing is to come, or to a time."""
        heap, end = self._heap, inf if until is None else until
        while heap and heap[0][0] <= end:
            at, _, do = heapq.heappop(heap)
            if at > self.now:  # as `step`, for the calls of which there are most
                self.now = at
            do()
        if until is not None:
            self.now = max(self.now, until)

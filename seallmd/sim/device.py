"""One simulated worker: carries messages out in order and takes time for it.

Owns what is in progress on a device (the step, the copy link) and the faults that can be done to it. Must
not decide anything, nor know what memory holds: that is a `Memory`'s, real (`sim.contents`) or `Blank`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.lending import speedup
from seallmd.sim.contention import Contention
from seallmd.sim.group import Meetings
from seallmd.sim.timing import Timing

GOES_ON, STOP = 0, 1


class Clock(Protocol):
    """What a device needs of the world around it."""

    @property
    def now(self) -> float:
        """Virtual seconds."""

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later."""

    def happen(self, event: ev.Event) -> None:
        """Tell the node."""


class Memory(Protocol):
    """What a device holds."""

    def reset(self) -> None:
        """An empty arena, and no request known."""

    def copy_begins(self, message: msg.CopyIn) -> None:
        """Blocks are written from now on."""

    def copy_ended(self, message: msg.CopyIn) -> None:
        """The weights are complete."""

    def drop(self, service: str) -> None:
        """Weights that no step may use any more."""

    def move(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Blocks are copied and renamed."""

    def save(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Blocks are copied to slots of host memory."""

    def restore(self, src: Sequence[int], dst: Sequence[int], device: int) -> None:
        """Slots of a device's host memory are copied to blocks."""

    def forget(self, requests: Sequence[int]) -> None:
        """Requests that are over."""

    def failed(self, step: msg.Step) -> None:
        """The step raised: its requests are over, and nothing was written."""

    def run(self, step: msg.Step) -> tuple[int, ...]:
        """The tokens that the step draws, one per row with `sample`."""

    def scores(self, step: msg.Step) -> tuple[msg.Scores, ...]:
        """The log-probabilities that requests of the step want; it has run."""

    def pooled(self, step: msg.Step) -> tuple[msg.Pooled, ...]:
        """The parts of vectors that requests of the step want; it has run."""


class Blank:
    """Holds and checks nothing. Tokens are GOES_ON until a request is as long as it is to be, then STOP.

    lengths: tokens of prompt and output together, by request; shared by all devices of a world. A row of a
    request that is over (it was on its way already) draws STOP, which nobody looks at.
    """

    def __init__(self, lengths: dict[int, int]) -> None:
        self._lengths = lengths

    def reset(self) -> None:
        """Nothing to forget."""

    def copy_begins(self, message: msg.CopyIn) -> None:
        """Nothing is kept."""

    def copy_ended(self, message: msg.CopyIn) -> None:
        """Nothing is kept."""

    def drop(self, service: str) -> None:
        """Nothing is kept."""

    def move(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Nothing is kept."""

    def save(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Nothing is kept."""

    def restore(self, src: Sequence[int], dst: Sequence[int], device: int) -> None:
        """Nothing is kept."""

    def forget(self, requests: Sequence[int]) -> None:
        """Nothing is kept."""

    def failed(self, step: msg.Step) -> None:
        """Nothing is kept."""

    def run(self, step: msg.Step) -> tuple[int, ...]:
        """STOP for rows whose drawn token is the request's last."""
        lengths = self._lengths
        return tuple(
            [
                STOP if row.start + row.count + 1 >= lengths.get(row.request, 0) else GOES_ON
                for row in step.rows
                if row.sample
            ]
        )

    def scores(self, step: msg.Step) -> tuple[msg.Scores, ...]:  # noqa: ARG002 - as `Memory` has it
        """Nobody asks."""
        return ()

    def pooled(self, step: msg.Step) -> tuple[msg.Pooled, ...]:  # noqa: ARG002 - as `Memory` has it
        """Nobody asks."""
        return ()


class Span(NamedTuple):
    """Something that took a device from `began` to `ended` (virtual seconds). kind: "step" or "copy"."""

    device: int
    service: str
    kind: str
    began: float
    ended: float


class SimDevice:
    """A worker process and its device. Steps run one after another; copies too, beside the steps.

    A step that is given blocks which are still being saved or restored waits for them, as on a GPU.
    block_bytes: of what one of them copies. poison: requests of which the process dies. lacks_memory: it is
    for lack of it that steps fail. stands_until: nothing new begins before. busy_seconds: of all steps that
    ended. on_span: told of each step and each copy of weights that ended. threads: its own.
    """

    def __init__(
        self,
        clock: Clock,
        index: int,
        arena_bytes: int,
        timing: Timing,
        memory: Memory,
        meetings: Meetings,
        contention: Contention,
        on_span: Callable[[Span], None] | None = None,
        block_bytes: int = 0,
        threads: int = 0,
    ) -> None:
        self._clock = clock
        self._threads = threads
        self._block_bytes = block_bytes
        self._timing = timing
        self._memory = memory
        self._meetings = meetings
        self._contention = contention
        self._contends = contention.contends(index)
        self._reads_host = timing.reads_host(index)
        self._on_span = on_span
        self.index = index
        self.arena_bytes = arena_bytes
        self.alive = False
        self.generation = 0
        self.fail_steps = 0
        self.fail_copies = 0
        self.lacks_memory = False
        self.stands_until = 0.0
        self.poison: set[int] = set()
        self.busy_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[msg.ToWorker] = deque()
        self._busy = False
        self._link_free_at = 0.0
        self._copied_at: dict[int, float] = {}  # blocks that are being saved or restored
        self._copying: dict[str, int] = {}
        self._groups: dict[str, msg.Group] = {}
        self._memory.reset()

    def start(self) -> None:
        """The process is up, with an empty arena."""
        self._reset()
        self.alive, self.stands_until = True, 0.0
        self._clock.happen(ev.WorkerUp(self.index, f"sim {self.index}", self.arena_bytes))

    def kill(self, restart_after: float) -> None:
        """The process is gone; another comes up later."""
        if not self.alive:
            return
        self.alive = False
        self.generation += 1
        self._contention.stop(self.index)
        for group in self._groups.values():
            self._meetings.break_up(group)
        self._clock.happen(ev.WorkerLost(self.index, "killed"))
        self._clock.after(restart_after, self.start)

    def receive(self, message: msg.ToWorker) -> None:
        """A message from the daemon."""
        if self.alive:
            self._queue.append(message)
            if not self._busy:
                self._work()

    def _later(self, seconds: float, do: Callable[..., None], *what: object) -> None:
        self._clock.after(seconds, partial(self._unless_dead, self.generation, do, *what))

    def _unless_dead(self, generation: int, do: Callable[..., None], *what: object) -> None:
        """Do what the process of a generation was to do, if it still lives."""
        if self.generation == generation:
            do(*what)

    def _say(
        self, message: msg.CopyDone | msg.CopyFailed | msg.BlocksCopied | msg.StepDone | msg.StepFailed
    ) -> None:
        self._clock.happen(ev.FromDevice(self.index, message))

    def _span(self, service: str, kind: str, began: float) -> None:
        if self._on_span is not None:
            self._on_span(Span(self.index, service, kind, began, self._clock.now))

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
                    self._groups.pop(service, None)
                    self._memory.drop(service)
                case msg.MoveBlocks(src, dst):
                    self._memory.move(src, dst)
                    self._copied_at |= {
                        to: self._copied_at[block]
                        for block, to in zip(src, dst, strict=True)
                        if block in self._copied_at
                    }
                case msg.SaveBlocks(src, dst, copy):
                    self._memory.save(src, dst)
                    self._copy_kv(src, copy)
                case msg.RestoreBlocks(src, dst, copy, device):
                    self._memory.restore(src, dst, device)
                    self._copy_kv(dst, copy)
                case msg.Forget(requests):
                    self._memory.forget(requests)
                case _:
                    pass

    # --------------------------------------------------------------------------------- copies

    def _copy_in(self, message: msg.CopyIn) -> None:
        self._memory.copy_begins(message)
        self._copying[message.service] = message.copy
        if message.group is not None:
            self._groups[message.service] = message.group
        seconds = self._take_link(sum(e.bytes_ for e in message.extents))
        ends = self._link_free_at
        self._later(ends - self._clock.now, self._end_copy, message, ends - seconds, seconds)
        if self._reads_host:
            self._bind(message, 0.0)

    def _take_link(self, bytes_: int) -> float:
        """Copy something, behind what is being copied: one link per device. Seconds of the copy itself."""
        seconds = self._timing.copy(self.index, bytes_)
        self._link_free_at = max(self._clock.now, self._link_free_at, self.stands_until) + seconds
        return seconds

    def _copy_kv(self, blocks: Sequence[int], copy: int) -> None:
        self._take_link(len(blocks) * self._block_bytes)
        now = self._clock.now
        self._copied_at = {block: at for block, at in self._copied_at.items() if at > now}
        self._copied_at.update(dict.fromkeys(blocks, self._link_free_at))
        if copy:
            self._later(self._link_free_at - now, self._say, msg.BlocksCopied(copy))

    def _end_copy(self, message: msg.CopyIn, began: float, seconds: float) -> None:
        if self._copying.get(message.service) != message.copy:
            return  # dropped meanwhile
        del self._copying[message.service]
        self._span(message.service, "copy", began)
        if not self._reads_host:
            self._bind(message, seconds)

    def _bind(self, message: msg.CopyIn, seconds: float) -> None:
        if self.fail_copies:
            self.fail_copies -= 1
            self._copying.pop(message.service, None)
            self._say(msg.CopyFailed(message.service, "made to fail", message.copy))
        else:
            self._memory.copy_ended(message)
            self._say(msg.CopyDone(message.service, seconds, message.copy))

    # --------------------------------------------------------------------------------- steps

    def _step(self, step: msg.Step) -> None:
        self._busy = True
        tokens = context = rows = 0
        for row in step.rows:
            tokens += row.count
            context += row.start + row.count
            rows += row.sample
        group = self._groups.get(step.service)
        ranks = 1 if group is None else group.ranks
        seconds = self._timing.step(self.index, step.service, tokens, context, rows, ranks)
        if step.threads:
            empty = self._timing.step(self.index, step.service, 0, 0, 0, ranks)
            seconds /= speedup(step.threads, self._threads, seconds, empty)
        now = self._clock.now
        waits = self.stands_until - now if self.stands_until > now else 0.0
        if self._link_free_at > now and self._copied_at:
            waits = max(waits, self._copies_left(step))
        if group is None:
            self._run_step(step, None, waits, seconds)
        else:
            start = partial(self._unless_dead, self.generation, self._run_step, step, group, waits)
            self._meetings.join(group, step.step, seconds, start)

    def _run_step(self, step: msg.Step, group: msg.Group | None, waits: float, seconds: float) -> None:
        if self._contends:
            ended = partial(self._end_step, step, group)
            self._later(waits, self._contention.run, self.index, seconds, ended)
        else:
            self._later(waits + seconds, self._end_step, step, group, seconds)

    def _copies_left(self, step: msg.Step) -> float:
        """Seconds until the blocks that a step is given have been saved or restored."""
        copied = (self._copied_at.get(block, 0.0) for row in step.rows for block in row.blocks)
        return max(0.0, max(copied, default=0.0) - self._clock.now)

    def _end_step(self, step: msg.Step, group: msg.Group | None, seconds: float) -> None:
        if self.poison and any(row.request in self.poison for row in step.rows):
            self.kill(restart_after=0.5)
            return
        self._busy = False
        self.busy_seconds += seconds
        if self._on_span is not None:
            self._span(step.service, "step", self._clock.now - seconds)
        if (self.fail_steps or group is not None) and self._fails(group):
            self._memory.failed(step)
            self._say(msg.StepFailed(step.step, "made to fail", self.lacks_memory))
        else:
            tokens = self._memory.run(step)
            scores, pooled = self._memory.scores(step), self._memory.pooled(step)
            if group is None or group.rank == 0:
                self._say(msg.StepDone(step.step, tokens, seconds, scores, (), pooled))
            else:
                self._say(msg.StepDone(step.step, (), seconds))
        self._work()

    def _fails(self, group: msg.Group | None) -> bool:
        """Whether the step at hand fails: made to, or because another rank is gone or failed."""
        if self.fail_steps:
            self.fail_steps -= 1
            if group is not None:
                self._meetings.break_up(group)
            return True
        return group is not None and self._meetings.is_broken(group)

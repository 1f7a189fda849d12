"""Whether those who have to answer still do: child processes, and the daemon's own event loop.

Owns two measures of silence. Must not know what is done about it (`engine` restarts, `daemon` tells systemd).

A child that works is not asked whether it lives: it owes an answer to each step, copy and image, and one that
is silent too long while it owes something hangs. So this costs nothing but a table entry per message on its
way. Only one that owes nothing and has been silent for long is asked (`wants_ping`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from seallmd.core import messages as msg

log = logging.getLogger(__name__)

STARTING_SECONDS = 900.0  # a first start may compile kernels on a busy machine
STEP_SECONDS, STEP_FACTOR = 30.0, 50.0  # a step that takes longer than both, by its prediction, hangs
_START = ("start", "", 0)


class Pulse:
    """One child's debts: what it was sent and has not answered. Times are seconds of one clock.

    Only what is answered without fail counts: a probe may download or convert for hours without a word. A
    step whose like is known may take STEP_FACTOR times what it should, or `limit_seconds` where that is less.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._owed: dict[tuple[str, str, int], float] = {}
        self._deadlines: dict[int, float] = {}  # seconds that steps may take, by their number
        self._heard = 0.0
        self._late = False

    def started(self, now: float) -> None:
        """A new process, which owes its Hello."""
        self._owed = {_START: now}
        self._deadlines.clear()
        self._heard = now
        self._late = False

    def sent(self, message: msg.Message, now: float, expects: float = 0.0) -> None:
        """The child was sent something. expects: seconds that it should take, 0 = unknown."""
        match message:
            case msg.Step(step):
                self._owed["step", "", step] = now
                if expects:
                    self._deadlines[step] = max(STEP_SECONDS, STEP_FACTOR * expects)
            case msg.CopyIn():
                self._owed["copy", message.service, message.copy] = now
            case msg.BuildImage(service):
                self._owed["image", service, 0] = now
            case msg.Ping():
                self._owed["ping", "", 0] = now
            case msg.DropWeights(service):  # ends a copy without an answer
                for key in [key for key in self._owed if key[:2] == ("copy", service)]:
                    del self._owed[key]

    def heard(self, message: msg.Message, now: float) -> None:
        """The child said something: it lives, whatever it was."""
        self._heard = now
        match message:
            case msg.StepDone(step) | msg.StepFailed(step):
                self._owed.pop(("step", "", step), None)
                self._deadlines.pop(step, None)
            case msg.CopyDone(service, _, copy) | msg.CopyFailed(service, _, copy):
                self._owed.pop(("copy", service, copy), None)
            case msg.ImageReady(service) | msg.ImageFailed(service):
                self._owed.pop(("image", service, 0), None)
            case msg.Pong():
                self._owed.pop(("ping", "", 0), None)
            case msg.Hello():
                self._owed.pop(_START, None)

    def wants_ping(self, now: float) -> bool:
        """Whether the child owes nothing and has been silent for so long that it should be asked."""
        return not self._owed and now - self._heard > self.limit_seconds / 2

    def look(self, now: float) -> str:
        """Why the child counts as hung; empty while it does not. To be called from time to time.

        It has to be late at two looks in a row: after the daemon itself stood still (a suspended machine, a
        debugger), the answers lie in the socket and are read between the two.
        """
        was, self._late = self._late, self._is_late(now)
        if not (was and self._late):
            return ""
        what = next(iter(self._owed))[0]
        return f"hung: owes an answer ({what}) and said nothing for {now - self._heard_or_asked():.0f} s"

    def _is_late(self, now: float) -> bool:
        if not self._owed:
            return False
        return now - self._heard_or_asked() > self._limit()

    def _limit(self) -> float:
        """How long the child may be silent. Debts are paid in order: the most patient one counts."""
        if _START in self._owed:
            return max(self.limit_seconds, STARTING_SECONDS)
        if len(self._deadlines) < len(self._owed):  # something of unknown length is among them
            return self.limit_seconds
        return min(self.limit_seconds, max(self._deadlines.values()))

    def _heard_or_asked(self) -> float:
        return max(self._heard, min(self._owed.values()))


class LoopWatch:
    """A thread that notices when the event loop stands still, and says in the log where.

    limit_seconds: what the loop may take for one turn. Whoever holds it up longer holds up every stream.
    longest_lag: seconds by which the loop's own timer came too late, at worst.
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit_seconds
        self._clock = clock
        self._turned = clock()
        self._looked = self._turned
        self._reported = False
        self.longest_lag = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the running loop, which is this thread's."""
        self._loop_thread = threading.get_ident()
        self._beat()
        self._looked = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._end.set()
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        self.turned()
        self._timer = asyncio.get_running_loop().call_later(self._limit / 2, self._beat)

    def turned(self) -> None:
        """The loop has come round."""
        now = self._clock()
        self.longest_lag = max(self.longest_lag, now - self._turned - self._limit / 2)
        if self._reported:
            self._reported = False
            log.warning("the event loop turns again after %.1f s", now - self._turned)
        self._turned = now

    def _watch(self) -> None:
        while not self._end.wait(self._limit / 2):
            self.look(lambda: sys._current_frames().get(self._loop_thread))

    def look(self, frame: Callable[[], FrameType | None]) -> None:
        """Log the stack of the loop's thread, once per standstill."""
        now = self._clock()
        slept, self._looked = now - self._looked, now
        if slept > 2 * self._limit:  # this thread stood still too: the process was stopped, not the loop
            self._turned = now
        elif now - self._turned > self._limit and not self._reported:
            self._reported = True
            log.warning("the event loop stands still since %.1f s: %s", now - self._turned, stack(frame()))


def stack(frame: FrameType | None) -> str:
    """A stack as one line, innermost call last; file names without directories."""
    calls: list[str] = []
    while frame is not None and len(calls) < 25:
        file = frame.f_code.co_filename.rpartition("/")[2]
        calls.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(calls))

"""Silence is measured right: what counts as hung, what does not, and where a loop stands still."""

from __future__ import annotations

import logging
import sys

import pytest

from seallmd.core import messages as msg
from seallmd.runtime.pulse import STARTING_SECONDS, LoopWatch, Pulse, stack

LIMIT = 10.0
STEP = msg.Step(1, "a", (), ())
DONE = msg.StepDone(1, (), 0.1)
COPY = msg.CopyIn("a", "", "float32", 0, "", (), copy=1)
HELLO = msg.Hello(1, "cpu", 0)


def up() -> Pulse:
    """A child that is up at 0."""
    pulse = Pulse(LIMIT)
    pulse.started(0.0)
    pulse.heard(HELLO, 0.0)
    return pulse


def hangs(pulse: Pulse, now: float) -> bool:
    """Whether it does, looking twice."""
    pulse.look(now)
    return bool(pulse.look(now))


def test_an_idle_child_may_be_silent() -> None:
    """It owes nothing: not at first, not after its answers."""
    pulse = up()
    assert not hangs(pulse, 1e6)
    pulse.sent(STEP, 1e6)
    pulse.heard(DONE, 1e6 + 1)
    assert not hangs(pulse, 2e6)


@pytest.mark.parametrize("message", [STEP, COPY, msg.BuildImage("a")])
def test_a_child_that_owes_an_answer_hangs(message: msg.Message) -> None:
    """From the moment it was asked, not from the last word before."""
    pulse = up()
    pulse.sent(message, 100.0)
    assert not hangs(pulse, 100.0 + LIMIT)
    assert hangs(pulse, 100.1 + LIMIT)


def test_progress_is_life() -> None:
    """A copy of many minutes is no hang as long as it gets on."""
    pulse = up()
    pulse.sent(COPY, 0.0)
    pulse.heard(msg.JobProgress("a", "copy", 1, 2), 9.0)
    assert not hangs(pulse, 18.0)
    assert hangs(pulse, 20.0)


def test_what_needs_no_answer_is_not_waited_for() -> None:
    """A dropped copy has no outcome; a probe may convert for hours; blocks move without a word."""
    pulse = up()
    pulse.sent(COPY, 0.0)
    pulse.sent(msg.DropWeights("a"), 1.0)
    pulse.sent(msg.Probe("a", "m", "auto", 0), 1.0)
    pulse.sent(msg.MoveBlocks((), ()), 1.0)
    assert not hangs(pulse, 1e6)


def test_the_outcome_of_an_older_copy_does_not_count() -> None:
    """The newer one is still owed."""
    pulse = up()
    pulse.sent(msg.CopyIn("a", "", "float32", 0, "", (), copy=2), 0.0)
    pulse.heard(msg.CopyDone("a", 1.0, 1), 0.0)
    assert hangs(pulse, LIMIT + 1)


def test_answers_that_lie_in_the_socket_are_read_first() -> None:
    """After the daemon itself was stopped for long, nobody is killed for its silence."""
    pulse = up()
    pulse.sent(STEP, 0.0)
    assert not pulse.look(1e6)
    pulse.heard(DONE, 1e6)
    assert not pulse.look(1e6 + 1)


def test_a_start_has_its_own_limit_and_a_new_process_no_debts() -> None:
    """Kernels may be compiled; what the dead one owed is forgotten."""
    pulse = up()
    pulse.sent(STEP, 0.0)
    pulse.started(100.0)
    assert not hangs(pulse, 100.0 + STARTING_SECONDS)
    assert hangs(pulse, 101.0 + STARTING_SECONDS)


class Clock:
    """Time that stands until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_that_stands_still_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the place where it stands, and again when it turns."""
    clock = Clock()
    watch = LoopWatch(1.0, clock)
    for clock.now in (0.5, 1.0, 1.5, 2.0, 2.5):
        watch.look(sys._getframe)
    watch.turned()
    for clock.now in (3.0, 3.4):
        watch.look(sys._getframe)
    first, last = caplog.messages
    assert first.startswith("the event loop stands still since 1.5 s: ")
    assert first.endswith("look")  # what asked for the frame, here
    assert "test_a_loop_that_stands_still" in first
    assert last == "the event loop turns again after 2.5 s"


def test_a_process_that_stood_still_is_no_slow_loop(caplog: pytest.LogCaptureFixture) -> None:
    """A suspended machine must not fill the log with innocent stacks."""
    caplog.set_level(logging.DEBUG)
    clock = Clock()
    watch = LoopWatch(1.0, clock)
    clock.now = 3600.0
    watch.look(sys._getframe)
    assert caplog.messages == []


def test_a_stack_is_one_line() -> None:
    """Outermost first, without directories."""
    line = stack(sys._getframe())
    assert line.endswith("test_a_stack_is_one_line")
    assert "\n" not in line
    assert "/" not in line
    assert stack(None) == ""


def test_a_known_step_has_a_deadline_of_its_own() -> None:
    """So many times what it should take; never more than the limit, never less than a slow moment."""
    pulse = up()
    pulse.limit_seconds = 1000.0
    pulse.sent(STEP, 0.0, expects=1.0)
    assert not hangs(pulse, 50.0)
    assert hangs(pulse, 51.0)
    pulse.heard(DONE, 51.0)
    pulse.sent(msg.Step(2, "a", (), ()), 100.0, expects=0.001)
    assert not hangs(pulse, 129.0)
    assert hangs(pulse, 131.0)
    pulse.sent(COPY, 131.0)
    assert not hangs(pulse, 500.0), "a copy of unknown length is on its way too"
    pulse.heard(msg.StepDone(2, (), 1.0), 500.0)
    pulse.heard(msg.CopyDone("a", 1.0, 1), 500.0)
    pulse.sent(msg.Step(3, "a", (), ()), 600.0, expects=1e6)
    assert not hangs(pulse, 1600.0)
    assert hangs(pulse, 1601.0)


def test_an_idle_child_is_asked_after_a_while() -> None:
    """Once, and not while it works or speaks; one that does not answer hangs."""
    pulse = up()
    assert not pulse.wants_ping(LIMIT / 2)
    assert pulse.wants_ping(LIMIT)
    pulse.sent(msg.Ping(), 10.0)
    assert not pulse.wants_ping(15.0)
    pulse.heard(msg.Pong(), 15.0)
    assert not hangs(pulse, 100.0)
    pulse.sent(msg.Ping(), 100.0)
    assert hangs(pulse, 111.0)

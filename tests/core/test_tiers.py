"""Tiers: who goes first, who gives up memory, and that batch work lives in the gaps that others leave."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from seallmd.core import events as ev
from seallmd.core.messages import Step
from seallmd.core.settings import ReplacementSettings
from seallmd.core.tiers import RANKS, Tier, arrival_of, is_deferred, seniority, yields
from tests.core.helpers import Recorder, shape, world

PROMPT = tuple(range(8))
TIERS: tuple[Tier, ...] = ("priority", "default", "flex", "batch")


def finished_in_order(recorder: Recorder) -> list[int]:
    """Requests by when they ended, all with the output of an undisturbed run."""
    recorder.world.run()
    for request in recorder.prompts:
        recorder.assert_output(request)
    return list(recorder.finished)


def test_a_tier_goes_before_the_next_however_late_it_comes() -> None:
    """Protects the order of the queue: one row at a time, and the most urgent that waits is next."""
    recorder = world({"a": shape()}, preload=("a",), max_rows=1, pipeline_depth=1)
    recorder.arrive(1, "a", PROMPT, 4)
    for request, tier in enumerate(reversed(TIERS), 2):
        recorder.arrive(request, "a", PROMPT, 4, tier=tier)
    recorder.arrive(6, "a", PROMPT, 4, tier="flex")
    assert [RANKS[recorder.prompts[r].tier] for r in finished_in_order(recorder)[1:]] == [0, 1, 2, 2, 3]


def test_words_of_tiers() -> None:
    """Protects the two relations that everything else is built on."""
    orders = [seniority(tier, arrival) for tier in TIERS for arrival in (1 << 40, (1 << 40) + 10**9)]
    assert orders == sorted(orders)
    assert all(first < second for first, second in pairwise(orders))
    assert [arrival_of(order) for order in orders] == [1 << 40, (1 << 40) + 10**9] * len(TIERS)
    assert [is_deferred(order) for order in orders] == [False] * 6 + [True] * 2
    assert [(a, b) for a in TIERS for b in TIERS if yields(a, b)] == [
        ("flex", "priority"), ("flex", "default"),
        ("batch", "priority"), ("batch", "default"), ("batch", "flex"),
    ]  # fmt: skip


@pytest.mark.parametrize(("tier", "waits"), [("batch", False), ("flex", False), ("default", True)])
def test_what_runs_yields_its_memory(tier: Tier, waits: bool) -> None:
    """Protects: an arena full of batch work is no reason to wait; full of requests of its own tier, it is."""
    recorder = world({"a": shape()}, (24,), preload=("a",))
    for request in range(1, 4):
        recorder.arrive(request, "a", tuple(range(request, request + 8)), 50, tier=tier)
        recorder.world.run(until=recorder.world.now + 0.05)
    state = recorder.world.node.state
    while (arena := state.devices[0].arena) is not None and arena.available > 3:
        recorder.world.step()
    recorder.arrive(10, "a", tuple(range(20, 36)), 4)
    for _ in range(8):
        recorder.world.step()
    late = state.requests.get(10)
    assert (late is not None and late.replica is None) is waits
    assert (finished_in_order(recorder)[0] == 10) is not waits


def test_batch_work_counts_for_no_limit_of_the_queue() -> None:
    """Protects interactive admission: a node full of batch lines still takes as many others as ever."""
    recorder = world({"a": shape()}, (24,), max_waiting_tokens=40)
    for request in range(1, 9):
        recorder.arrive(request, "a", PROMPT, 4, tier="batch")
    for request in range(11, 16):
        recorder.arrive(request, "a", PROMPT, 4)
    recorder.arrive(16, "a", PROMPT, 4)
    assert [r for r, end in recorder.finished.items() if end.code == "overloaded"] == [16]
    recorder.world.run()
    assert sum(end.reason == "length" for end in recorder.finished.values()) == 13


def steps_of(recorder: Recorder) -> list[Step]:
    """Every step that the node sends from now on."""
    found: list[Step] = []
    observe = recorder.world._observe

    def look(event: ev.Event, actions: list[ev.Action]) -> None:
        found.extend(a.message for a in actions if isinstance(a, ev.ToDevice) and isinstance(a.message, Step))
        observe(event, actions)

    recorder.world._observe = look
    return found


def test_batch_rows_make_an_interactive_step_no_longer_than_allowed() -> None:
    """Protects the latency of who streams: its steps take batch work along only within `batch_slowdown`."""
    recorder = world({"a": shape()}, (60,), preload=("a",), batch_slowdown=1.25, pipeline_depth=1)
    costs = recorder.world.node.state.services["a"].profile.costs  # type: ignore[union-attr]
    recorder.arrive(1, "a", PROMPT, 30)
    recorder.world.run(until=recorder.world.now + 0.05)
    steps = steps_of(recorder)
    for request in range(2, 12):
        recorder.arrive(request, "a", tuple(range(request, request + 30)), 6, tier="batch")
    mixed = 0
    while 1 in recorder.world.node.state.requests:
        steps.clear()
        recorder.world.step()
        for step in steps:
            own = [row for row in step.rows if row.request == 1]
            if own and len(step.rows) > 1:
                mixed += 1
                alone = costs.predict(own[0].count, own[0].start + own[0].count, own[0].sample)
                tokens = sum(row.count for row in step.rows)
                context = sum(row.start + row.count for row in step.rows)
                assert costs.predict(tokens, context, sum(row.sample for row in step.rows)) <= 1.25 * alone
    assert mixed > 5, "batch work never came along: nothing was tested"
    finished_in_order(recorder)


def test_another_service_s_batch_work_waits_for_the_gaps() -> None:
    """Protects: while one service has requests of others to step, a batch of another gets no step."""
    recorder = world({"a": shape(), "b": shape()}, (60,), preload=("a", "b"), pipeline_depth=1)
    for request in range(1, 5):
        recorder.arrive(request, "b", (request, *PROMPT), 30, tier="batch")
    recorder.arrive(9, "a", PROMPT, 30)
    steps = steps_of(recorder)
    while 9 in recorder.world.node.state.requests:
        recorder.world.step()
    assert {step.service for step in steps[:-1]} == {"a"}
    assert finished_in_order(recorder)[0] == 9


def test_a_busy_model_is_not_swapped_out_for_a_batch() -> None:
    """Protects: batch work of an absent model waits until the resident one is idle, patience or not."""
    recorder = world({"a": shape(), "b": shape()}, (22,), preload=("a",), patience_seconds=0.1)
    recorder.arrive(1, "b", PROMPT, 4, tier="batch")
    number = 100
    for _ in range(40):
        number += 1
        recorder.arrive(number, "a", PROMPT, 20)
        while len(recorder.world.node.state.requests) > 2:
            recorder.world.step()
        assert 1 not in recorder.finished
    assert finished_in_order(recorder)[-1] == 1


def test_batch_work_leaves_at_once_for_somebody_who_waits() -> None:
    """Protects the time until an absent model comes: its resident neighbour's batch is not run to its end."""
    recorder = world({"a": shape(), "b": shape()}, (22,), preload=("a",), min_residency_swaps=0.0)
    recorder.arrive(1, "a", PROMPT, 50, tier="batch")
    recorder.world.run(until=recorder.world.now + 0.02)
    recorder.arrive(2, "b", PROMPT, 4)
    assert finished_in_order(recorder) == [2, 1]


def test_two_batches_share_a_device_by_rare_swaps() -> None:
    """Protects throughput and progress: neither of two endless batches waits for ever, and swaps are rare."""
    recorder = world({"a": shape(), "b": shape()}, (22,), min_residency_swaps=0.0, check_every_event=False)
    done = {"a": 0, "b": 0}
    number = 0
    for _ in range(6000):
        recorder.world.step()
        busy = Counter(r.service for r in recorder.world.node.state.requests.values())
        for name in done:
            if busy[name] < 4:
                number += 1
                recorder.arrive(number, name, (number % 50, *PROMPT), 10, tier="batch")
    for request in recorder.finished:
        done[recorder.prompts[request].service] += 1
    swaps = sum(service.swaps_in for service in recorder.world.node.state.services.values())
    assert min(done.values()) > 0.2 * sum(done.values())
    assert swaps < 0.1 * sum(done.values()), "they take turns at every request"


def mean_seconds(lines: int, **limits: object) -> tuple[float, float, int]:
    """Of sixty interactive requests, with so many lines of two batches always there: until the first token,
    and until the end; and how many lines were answered meanwhile."""
    recorder = world(
        {"a": shape(), "b": shape()}, (40,), preload=("a", "b"), check_every_event=False, **limits
    )
    began, first, last = dict[int, float](), dict[int, float](), dict[int, float]()

    def watch(_: ev.Event, actions: list[ev.Action]) -> None:
        for action in actions:
            if isinstance(action, ev.Emit):
                first.setdefault(action.request, recorder.world.now)
            elif isinstance(action, ev.Finish):
                last[action.request] = recorder.world.now

    recorder.world._observe = watch
    number = 1000
    for request in range(1, 61):
        began[request] = recorder.world.now
        recorder.arrive(request, "ab"[request % 2], (request % 50, *PROMPT), 12)
        until = began[request] + 0.25
        while recorder.world.now < until:
            while sum(r > 1000 for r in recorder.world.node.state.requests) < lines:
                number += 1
                prompt = tuple((number * k) % 50 for k in range(1, 25))
                recorder.arrive(number, "ab"[number % 2], prompt, 20, tier="batch")
            recorder.world.run(until=min(until, recorder.world.now + 0.01))
    recorder.world.run(until=recorder.world.now + 5)
    to_first = [first[request] - began[request] for request in began]
    to_end = [last[request] - began[request] for request in began]
    return sum(to_first) / 60, sum(to_end) / 60, sum(r > 1000 for r in last)


def test_a_flood_of_batch_work_costs_interactive_requests_little() -> None:
    """Protects the promise as a whole, in virtual time: lines get done in the gaps, and who waits in person
    hardly sees it."""
    quiet_first, quiet_end, _ = mean_seconds(0)
    first, end, answered = mean_seconds(16)
    assert answered > 60
    assert end < 1.4 * quiet_end
    assert first < quiet_first + 0.06  # two steps that were on their way


@pytest.mark.parametrize("tier", TIERS)
def test_an_operators_evict_is_for_those_who_came_before_it(tier: Tier) -> None:
    """Whatever their tier: nobody who comes later holds it up, nobody who came before has it come back."""
    unplanned = ReplacementSettings(enabled=False)
    recorder = world({"a": shape()}, (60,), max_rows=2, replicate=False, replacement=unplanned)
    for request in range(1, 9):
        recorder.arrive(request, "a", (request,), 30, tier=tier)
    recorder.world.run(until=recorder.world.now + 0.3)
    recorder.world.happen(ev.EvictWanted(1, "a"))
    assert len(recorder.finished) < 6, "nobody waits"
    number, ends = 100, recorder.world.now + 10.0
    while 1 not in recorder.answers:
        if recorder.world.now >= ends - 10.0 + 0.1 * (number - 100):
            number += 1
            recorder.arrive(number, "a", (number % 50,), 30, tier=tier)
        recorder.world.step()
        assert recorder.world.now < ends, "it never left"
    assert set(recorder.finished) == set(range(1, 9))
    assert number > 105, "nobody came after it"
    finished_in_order(recorder)

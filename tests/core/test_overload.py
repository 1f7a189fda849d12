"""More than can be served: refused early, by requests and by tokens, and nothing grows."""

from __future__ import annotations

from tests.core.helpers import shape, world


def test_waiting_tokens_are_bounded_over_all_services() -> None:
    """One service's long prompts count for all; what was admitted ends; then there is room again."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(40,), max_waiting_tokens=200)
    for request in range(1, 31):
        recorder.arrive(request, "ab"[request % 2], (1,) * 40, 4)
    refused = [r for r, finish in recorder.finished.items() if finish.code == "overloaded"]
    assert 20 <= len(refused) < 30
    assert all(recorder.finished[r].retry_after > 0 for r in refused)
    waiting = sum(s.waiting_tokens for s in recorder.world.node.state.services.values())
    assert waiting <= 200
    recorder.world.run()
    for request in set(recorder.prompts) - set(refused):
        recorder.assert_output(request)
    recorder.arrive(100, "a", (1, 2), 4)
    recorder.world.run()
    recorder.assert_output(100)


def test_a_prompt_above_the_limit_is_served_alone() -> None:
    """A limit below one context must not make long prompts impossible."""
    recorder = world({"a": shape()}, max_waiting_tokens=10)
    recorder.arrive(1, "a", (1,) * 40, 4)
    recorder.world.run()
    recorder.assert_output(1)


def test_ten_times_the_load_leaves_no_trace_of_the_refused() -> None:
    """The node's own books hold what was admitted, and nothing else."""
    recorder = world({"a": shape()}, arenas=(40,), max_waiting_tokens=400, check_every_event=False)
    state = recorder.world.node.state
    for request in range(1, 2001):
        recorder.arrive(request, "a", (request % 50, 2, 3), 10)
        assert len(state.requests) <= 400
    recorder.world.node.check()
    assert len(recorder.finished) > 1500
    recorder.world.run()
    assert not state.requests
    assert state.services["a"].waiting_tokens == 0

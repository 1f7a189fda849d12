"""What clients are told to wait: as long as it takes, as far as that is known."""

from __future__ import annotations

from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core.estimate import READ_BYTES_PER_SECOND, coming_seconds, queue_seconds, wait_seconds
from tests.core.helpers import shape, world

MIB = 1 << 20


def test_a_model_that_is_away_takes_its_reading_and_its_copy() -> None:
    """Known by its size, then by what was measured; nothing once it is there."""
    recorder = world({"a": shape()})
    state, service = recorder.world.node.state, recorder.world.node.state.services["a"]
    copy_rate = state.settings.roofline.copy_bytes_per_second
    expected = 1024 / READ_BYTES_PER_SECOND + 1024 / copy_rate
    assert abs(coming_seconds(state, service) - expected) < 1e-12
    recorder.world.happen(ev.LoadWanted(1, "a"))
    recorder.world.run(until=20.0)
    assert coming_seconds(state, service) == 0.0
    recorder.world.happen(ev.EvictWanted(2, "a"))
    recorder.world.run()
    assert coming_seconds(state, service) == service.last_swap_seconds > 0


def test_a_full_queue_has_room_long_before_it_is_empty() -> None:
    """So that is what its refusal says, and not how long all those in it are going to take."""
    recorder = world({"a": shape()}, arenas=(40,), max_rows=1)
    state, service = recorder.world.node.state, recorder.world.node.state.services["a"]
    service.settings = replace(service.settings, max_waiting=400)
    recorder.world.happen(ev.LoadWanted(1, "a"))
    recorder.world.run()
    for request in range(1, 420):
        recorder.arrive(request, "a", (1, 2), 60)
    refusal = recorder.finished[419]
    assert (refusal.code, refusal.retry_after) == ("overloaded", queue_seconds(state, service))
    assert wait_seconds(state, service) > 10 * refusal.retry_after


def test_progress_shortens_the_wait() -> None:
    """Half read is half the reading."""
    recorder = world({"a": shape(segments=(MIB,))}, arenas=(8000,))
    state, service = recorder.world.node.state, recorder.world.node.state.services["a"]
    whole = coming_seconds(state, service)
    service.progress = ("read", 50, 100)
    read = MIB / READ_BYTES_PER_SECOND
    assert abs(whole - coming_seconds(state, service) - read / 2) < 1e-9


def test_a_full_queue_says_when_to_come_back() -> None:
    """Between one second and what official clients heed."""
    recorder = world({"a": shape()})
    state, service = recorder.world.node.state, recorder.world.node.state.services["a"]
    assert 1.0 <= queue_seconds(state, service) <= 120.0

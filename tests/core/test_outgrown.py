"""Requests that outgrow a smaller device: their service moves to a larger one, and no token is lost."""

from __future__ import annotations

import random

import pytest

from seallmd.core import events as ev
from seallmd.core.settings import ReplacementSettings
from tests.core.helpers import VOCAB, Recorder, shape, world

# Blocks of 16 tokens. Weights take four; the small device has 16 for KV, 256 tokens.
MODEL = shape(token_bytes=16, context=900)
SMALL, LARGE = 20, 60
LONG = tuple(number % VOCAB for number in range(200))


def on_the_small_one(pinned: tuple[str, ...] = ()) -> Recorder:
    """Service "a" resident on device 0, while device 1 has more room."""
    recorder = world({"a": MODEL}, (SMALL, LARGE), pinned=pinned, replicate=False)
    recorder.world.happen(ev.DeviceDrainWanted(1, 1))
    recorder.world.happen(ev.LoadWanted(2, "a"))
    recorder.world.run()
    recorder.world.happen(ev.DeviceDrainWanted(3, 1, drained=False))
    assert place_of(recorder) == (0,)
    return recorder


def place_of(recorder: Recorder) -> tuple[int, ...]:
    return recorder.world.node.status(0).services[0].devices


def test_short_ones_stay() -> None:
    """Most requests are allowed to become longer than they do."""
    recorder = on_the_small_one()
    recorder.arrive(1, "a", LONG, 600, stop_ids=tuple(range(0, VOCAB, 2)))
    recorder.world.run()
    recorder.assert_output(1)
    assert place_of(recorder) == (0,)


@pytest.mark.parametrize("pinned", [(), ("a",)])
def test_one_that_grows(pinned: tuple[str, ...]) -> None:
    """It goes on where it was, on the larger device; so does its neighbour. A pin is against others."""
    recorder = on_the_small_one(pinned)
    recorder.arrive(1, "a", LONG, 600)
    recorder.arrive(2, "a", (7, 8), 6)
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    assert place_of(recorder) == (1,)
    assert any("outgrown" in note for note in recorder.notes)


def test_a_long_prompt() -> None:
    """What has no room from the beginning is not tried on the small device."""
    recorder = on_the_small_one()
    recorder.arrive(1, "a", LONG * 2, 5)
    recorder.world.run()
    recorder.assert_output(1)
    assert place_of(recorder) == (1,)
    assert not any("outgrown" in note for note in recorder.notes)


@pytest.mark.parametrize("planned", [False, True])
def test_on_a_quiet_node(planned: bool) -> None:
    """A request that finds its device too small is moved at once, though no other event comes."""
    settings = ReplacementSettings(enabled=planned)  # plans are not made while a device is drained
    models = {"a": shape(context=400), "p": shape(segments=(120 * 256,))}
    groups = {"p": ((0,),), "a": ((0,), (1,))}
    recorder = world(models, (200, 200, 200), groups=groups, pinned=("p",), replacement=settings)
    recorder.world.happen(ev.DeviceDrainWanted(1, 2))
    recorder.world.happen(ev.DeviceDrainWanted(2, 1))
    recorder.world.happen(ev.LoadWanted(3, "a"))
    recorder.world.run()
    recorder.world.happen(ev.DeviceDrainWanted(4, 1, drained=False))
    recorder.world.run()
    recorder.arrive(1, "a", LONG + LONG[:130], 10)
    recorder.world.run(until=recorder.world.now + 10)
    recorder.assert_output(1)


def test_the_largest_is_lost() -> None:
    """What no device left can hold to its end goes where it fits now, though a smaller one is emptier."""
    off, models = ReplacementSettings(enabled=False), {"a": shape(context=2048), "b": shape()}
    groups = {"b": ((1,),)}
    recorder = world(models, (100, 200, 400), groups=groups, preload=("b",), replicate=False, replacement=off)
    recorder.arrive(1, "a", LONG * 2 + LONG[:100], 800)
    recorder.world.run(until=recorder.world.now + 0.5)
    before, service = len(recorder.outputs[1]), recorder.world.node.state.services["a"]
    recorder.world.devices[2].kill(restart_after=1000.0)
    while len(recorder.outputs[1]) == before:
        assert service.swaps_in <= 2, "it comes and goes"
        assert recorder.world.step()
    assert place_of(recorder) == (1,)


def test_several() -> None:
    """Seniors and juniors alike end well."""
    recorder = on_the_small_one()
    for request in range(1, 6):
        recorder.arrive(request, "a", LONG[:request], 150 * request)
    recorder.world.run()
    for request in range(1, 6):
        recorder.assert_output(request)


def test_nowhere_to_go() -> None:
    """When nothing larger is left, the request is told, and others go on."""
    recorder = on_the_small_one()
    recorder.world.happen(ev.DeviceDrainWanted(4, 1))
    recorder.arrive(1, "a", LONG, 600)
    recorder.arrive(2, "a", (7, 8), 6)
    recorder.world.run()
    assert recorder.finished[1].code == "out_of_memory"
    recorder.assert_output(2)


@pytest.mark.parametrize("seed", range(8))
def test_random_histories(seed: int) -> None:
    """Two services on unequal devices, requests of all lengths, some cancelled: the others end well."""
    chance = random.Random(seed)
    recorder = world({"a": MODEL, "b": MODEL}, (SMALL, SMALL + 4, LARGE), check_every_event=False)
    cancelled = set()
    for request in range(1, 25):
        prompt = LONG[: chance.randrange(1, 200)] * chance.choice((1, 1, 3))
        recorder.arrive(request, chance.choice("ab"), prompt, chance.randrange(1, 250))
        recorder.world.run(until=recorder.world.now + chance.random())
        if chance.random() < 0.2:
            cancelled.add(request)
            recorder.world.happen(ev.Cancelled(request))
        recorder.world.node.check()
    recorder.world.run()
    for request in set(recorder.prompts) - cancelled:
        recorder.assert_output(request)

"""The map of an arena: what it shows adds up to what the ledger holds."""

from __future__ import annotations

from collections import Counter

from seallmd.core.arena_map import arena_maps
from seallmd.core.service import Stage
from seallmd.core.state import Device
from seallmd.core.status import ArenaMap, Cell
from tests.core.helpers import Recorder, shape, world


def check(recorder: Recorder) -> Counter[Cell]:
    """With a cell for each block, the map is the ledger. All that is shown, over all devices."""
    state = recorder.world.node.state
    shown: Counter[Cell] = Counter()
    for map_ in arena_maps(state, 1000):
        check_device(state.devices[map_.device], map_)
        shown.update(map_.cells)
    return shown


def check_device(device: Device, map_: ArenaMap) -> None:
    arena = device.arena
    assert arena is not None
    kinds = Counter(cell.kind for cell in map_.cells)
    assert len(map_.cells) == map_.blocks == arena.capacity
    assert kinds["weights"] + kinds["copying"] == arena.weights == sum(h.weights for h in map_.holdings)
    assert kinds["kv"] + kinds["promised"] == arena.kv == sum(h.kv + h.promised for h in map_.holdings)
    assert kinds["cached"] == arena.cached
    assert kinds["free"] == arena.available - arena.cached


def test_every_block_is_shown_once() -> None:
    """Through a crowded run with swaps, groups of two and shared prefixes, at many moments."""
    recorder = world(
        {"a": shape(), "b": shape(ranks=(1, 2)), "c": shape()},
        arenas=(21, 30),
        tensor_parallel={"b": 2},
        min_residency_swaps=2.0,
    )
    for request in range(1, 25):
        recorder.arrive(request, "abc"[request % 3], (7, 7, 7, 7, 7, request % 5), 20)
    seen: set[str] = set()
    while recorder.prompts.keys() - recorder.finished.keys():
        seen |= {cell.kind for cell in check(recorder)}
        recorder.world.run(until=recorder.world.now + 0.002)
    seen |= {cell.kind for cell in check(recorder)}
    assert seen == {"weights", "copying", "kv", "promised", "cached", "free"}


def test_cells_show_the_majority() -> None:
    """With fewer cells than blocks the order stays, and a small holder does not hide a large one."""
    recorder = world({"a": shape()}, arenas=(40,), preload=("a",))
    (map_,) = arena_maps(recorder.world.node.state, 10)
    assert [cell.kind for cell in map_.cells] == ["weights"] + ["free"] * 9
    assert (map_.blocks, map_.holdings[0].weights) == (40, 4)


def test_weights_on_their_way() -> None:
    """Memory that a copy is about to fill is told from what can be used."""
    recorder = world({"a": shape()}, arenas=(40,), preload=("a",))
    recorder.world.node.state.devices[0].replicas["a"].stage = Stage.COPYING
    (map_,) = arena_maps(recorder.world.node.state, 40)
    assert Counter(cell.kind for cell in map_.cells) == {"copying": 4, "free": 36}
    assert map_.holdings[0].weights == 4


def test_a_device_without_worker_has_no_map() -> None:
    """There is nothing to draw until it is up."""
    recorder = world({"a": shape()}, arenas=(40,))
    recorder.world.node.state.devices[0].arena = None
    assert arena_maps(recorder.world.node.state, 10) == []

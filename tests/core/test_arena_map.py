"""The map of an arena shows who holds what, where it is."""

from __future__ import annotations

from seallmd.core import events as ev
from seallmd.core.arena_map import arena_maps
from tests.core.helpers import shape, world


def test_weights_below_kv_above() -> None:
    """One cell a block where there are enough cells; fewer cells show who holds most of each."""
    recorder = world({"a": shape(), "b": shape()}, arenas=(40, 40))
    recorder.world.happen(ev.LoadWanted(1, "a"))
    recorder.world.run(until=20.0)
    recorder.arrive(1, "a", tuple(range(8)), 40)
    recorder.world.run(until=20.2)
    state = recorder.world.node.state
    (arena,) = [m for m in arena_maps(state, 100) if any(cell.service for cell in m.cells)]
    assert len(arena.cells) == 40
    kinds = [cell.kind for cell in arena.cells]
    assert kinds[:4] == ["weights"] * 4
    assert kinds.count("weights") == 4
    held = len(state.requests[1].tables[0])
    assert kinds.count("kv") == held > 0
    assert {cell.service for cell in arena.cells} == {"a", ""}
    coarse = next(m for m in arena_maps(state, 10) if m.device == arena.device)
    assert [cell.kind for cell in coarse.cells[:2]] == ["weights", "free"]


def test_a_lost_device_has_no_map() -> None:
    """Nothing is known of it."""
    recorder = world({"a": shape()}, arenas=(40, 40))
    recorder.world.devices[0].kill(restart_after=5.0)
    assert [arena.device for arena in arena_maps(recorder.world.node.state, 8)] == [1]

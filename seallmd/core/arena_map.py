"""Who holds which part of a device's arena, for people to look at.

Owns the drawing of a ledger on so many cells. Must not change anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from seallmd.core.state import Device, NodeState
from seallmd.core.status import ArenaMap, Cell

_FREE = Cell("free", "")


def arena_maps(state: NodeState, cells: int) -> list[ArenaMap]:
    """Every running device in so many cells of equal size, or fewer where it has fewer blocks."""
    return [_map(state, device, cells) for device in state.devices.values() if device.arena is not None]


def _map(state: NodeState, device: Device, cells: int) -> ArenaMap:
    assert device.arena is not None
    capacity = device.arena.capacity
    cells = max(1, min(cells, capacity))
    held: list[Counter[Cell]] = [Counter() for _ in range(cells)]
    for replica in device.replicas.values():
        rank = replica.devices.index(device.index)
        weights, kv = Cell("weights", replica.service), Cell("kv", replica.service)
        sizes = state.services[replica.service].segment_blocks
        for start, size in zip(replica.starts[rank], sizes, strict=True):
            _add(held, capacity, weights, range(start, start + size))
        blocks = {block for request in replica.running.values() for block in request.tables[rank]}
        _add(held, capacity, kv, blocks)
    return ArenaMap(device.index, tuple(_winner(counter) for counter in held))


def _add(held: list[Counter[Cell]], capacity: int, owner: Cell, blocks: Iterable[int]) -> None:
    for block in blocks:
        held[block * len(held) // capacity][owner] += 1


def _winner(counter: Counter[Cell]) -> Cell:
    """What a cell shows: who holds most of it, if anybody holds anything."""
    return max(counter, key=lambda cell: (counter[cell], cell.kind, cell.service), default=_FREE)

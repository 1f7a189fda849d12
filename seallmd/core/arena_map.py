"""Who holds which part of a device's arena, for people to look at.

Owns the drawing of a ledger on so many cells, and the exact sums beside it. Must not change anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from seallmd.core.state import Device, NodeState, Replica, Service, Stage
from seallmd.core.status import ArenaMap, Cell, Holding

_FREE, _CACHED = Cell("free", ""), Cell("cached", "")


def arena_maps(state: NodeState, cells: int) -> list[ArenaMap]:
    """Every running device in so many cells of equal size, or fewer where it has fewer blocks."""
    return [_map(state, device, cells) for device in state.devices.values() if device.arena is not None]


def _map(state: NodeState, device: Device, cells: int) -> ArenaMap:
    assert device.arena is not None
    capacity = device.arena.capacity
    cells = max(1, min(cells, capacity))
    shown: list[Counter[Cell]] = [Counter() for _ in range(cells)]
    holdings = []
    for replica in device.replicas.values():
        held: Counter[str] = Counter()
        for cell, blocks in _held(state.services[replica.service], replica, device.index):
            held[cell.kind] += _add(shown, capacity, cell, blocks)
        weights = held["weights"] + held["copying"]
        holdings.append(Holding(replica.service, weights, held["kv"], held["promised"]))
    _add(shown, capacity, _CACHED, device.arena.cached_blocks())
    claim = device.claim.service if device.claim is not None else ""
    return ArenaMap(device.index, capacity, tuple(map(_winner, shown)), tuple(holdings), claim)


def _held(service: Service, replica: Replica, device: int) -> Iterator[tuple[Cell, Iterable[int]]]:
    """What a replica holds on a device; no block is named twice."""
    rank = replica.devices.index(device)
    weights = Cell("copying" if replica.stage is Stage.COPYING else "weights", service.name)
    for start, size in zip(replica.starts[rank], service.segment_blocks, strict=True):
        yield weights, range(start, start + size)
    filled: set[int] = set()
    tables: set[int] = set()
    for request in replica.running.values():
        table = request.tables[rank]
        tables.update(table)
        filled.update(table[: service.blocks_for(request.computed)])
    yield Cell("kv", service.name), filled
    yield Cell("promised", service.name), tables - filled


def _add(shown: list[Counter[Cell]], capacity: int, owner: Cell, blocks: Iterable[int]) -> int:
    count = 0
    for block in blocks:
        shown[block * len(shown) // capacity][owner] += 1
        count += 1
    return count


def _winner(counter: Counter[Cell]) -> Cell:
    """What a cell shows: who holds most of it, if anybody holds anything."""
    return max(counter, key=lambda cell: (counter[cell], cell.kind, cell.service), default=_FREE)

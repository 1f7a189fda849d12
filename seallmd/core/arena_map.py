"""Who holds which part of a device's arena, for people to look at.

Owns the drawing of a ledger on so many cells, and the exact sums beside it. Must not change anything. Every
block is visited, and there are tens of thousands on a large GPU: hence numbers instead of structs inside.
"""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import pairwise

from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import Device, NodeState
from seallmd.core.status import ArenaMap, Cell, Holding

_FREE, _CACHED = 0, 1  # what the block's number in a `_Drawing` means; replicas have the further ones
_KINDS = ("weights", "copying", "kv", "promised")  # of a replica, in the order of its numbers


def arena_maps(state: NodeState, cells: int) -> list[ArenaMap]:
    """Every running device in so many cells of equal size, or fewer where it has fewer blocks."""
    return [_map(state, device, cells) for device in state.devices.values() if device.arena is not None]


def _map(state: NodeState, device: Device, cells: int) -> ArenaMap:
    assert device.arena is not None
    drawing = _Drawing(device.arena.capacity)
    for block in device.arena.cached_blocks():
        drawing.blocks[block] = _CACHED
    for replica in device.replicas.values():
        drawing.add(state.services[replica.service], replica, replica.devices.index(device.index))
    claim = device.claim.service if device.claim is not None else ""
    return ArenaMap(device.index, len(drawing.blocks), drawing.cells(cells), drawing.holdings(), claim)


class _Drawing:
    """One number per block, for what it holds."""

    def __init__(self, capacity: int) -> None:
        self.blocks = array("H", bytes(2 * capacity))
        self._legend = [Cell("free", ""), Cell("cached", "")]  # by number

    def add(self, service: Service, replica: Replica, rank: int) -> None:
        """Everything that a replica holds on the device of one of its ranks."""
        weights, copying, kv, promised = range(len(self._legend), len(self._legend) + len(_KINDS))
        self._legend += [Cell(kind, service.name) for kind in _KINDS]
        number = copying if replica.stage is Stage.COPYING else weights
        for start, size in zip(replica.starts[rank], service.segment_blocks, strict=True):
            self.blocks[start : start + size] = array("H", [number]) * size
        # In two rounds: what one request has filled, another may share before it has come so far.
        tables = [(request.tables[rank], request.computed) for request in replica.running.values()]
        for table, computed in tables:
            for block in table[service.blocks_for(computed) :]:
                self.blocks[block] = promised
        for table, computed in tables:
            for block in table[: service.blocks_for(computed)]:
                self.blocks[block] = kv

    def cells(self, count: int) -> tuple[Cell, ...]:
        """So many cells, or one per block; each shows who holds most of it, if anybody holds anything."""
        capacity = len(self.blocks)
        count = max(1, min(count, capacity))
        bounds = [-(-cell * capacity // count) for cell in range(count + 1)]
        return tuple(self._legend[_winner(self.blocks[start:end])] for start, end in pairwise(bounds))

    def holdings(self) -> tuple[Holding, ...]:
        """The sums by service, in the order they were added."""
        blocks: dict[str, Counter[str]] = {cell.service: Counter() for cell in self._legend[_CACHED + 1 :]}
        for number, held in Counter(self.blocks).items():
            if number > _CACHED:
                blocks[self._legend[number].service][self._legend[number].kind] += held
        return tuple(
            Holding(service, held["weights"] + held["copying"], held["kv"], held["promised"])
            for service, held in blocks.items()
        )


def _winner(blocks: array[int]) -> int:
    first = blocks[0]
    if blocks.count(first) == len(blocks):
        return first
    counts = Counter(blocks)
    del counts[_FREE]
    return max(counts, key=lambda number: (counts[number], number))

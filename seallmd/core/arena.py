"""The ledger of one device's memory: equal blocks that hold weights or KV.

Owns who has which block, and the choice of places. Must not know what a request or a service does, nor
torch: the worker's arena holds the bytes, this one the truth about them. The ledger runs ahead of the
worker: messages are carried out in order, so a block may change hands here at once.

KV takes single blocks from the top, weights take runs from the bottom, so that runs stay whole for long.
A block whose last reader left but whose contents are a known prefix is *cached*: free for whoever needs it,
least recently used first.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from seallmd.core.prefix import PrefixIndex

FREE, CACHED, KV, WEIGHTS = range(4)
_CACHED_IS_FREE = bytes([FREE, FREE, KV, WEIGHTS]) + bytes(range(4, 256))
_KV_IS_FREE = bytes([FREE, FREE, FREE, WEIGHTS]) + bytes(range(4, 256))


class Placement(NamedTuple):
    """Where weights went. starts: first block of each segment. moves: KV blocks that had to make way."""

    starts: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]


class Arena:
    """Blocks 0 .. capacity-1 of one device."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.prefix = PrefixIndex()
        self._state = bytearray(capacity)
        self._refs = array("I", bytes(4 * capacity))
        self._cached: dict[int, None] = {}  # least recently used first
        self._weights: dict[Hashable, tuple[tuple[int, int], ...]] = {}  # owner -> (start, blocks) runs
        self._counts = [capacity, 0, 0, 0]
        self._top = capacity  # no block at or above is free

    # ------------------------------------------------------------------------------------- counts

    @property
    def available(self) -> int:
        """Blocks that can be had at once: free and cached."""
        return self._counts[FREE] + self._counts[CACHED]

    @property
    def cached(self) -> int:
        """Blocks that hold reusable prefixes and belong to nobody."""
        return self._counts[CACHED]

    def cached_blocks(self) -> list[int]:
        """Which these are, the least recently used first."""
        return list(self._cached)

    @property
    def kv(self) -> int:
        """Blocks that requests hold."""
        return self._counts[KV]

    @property
    def weights(self) -> int:
        """Blocks that hold weights."""
        return self._counts[WEIGHTS]

    def refs(self, block: int) -> int:
        """How many tables name this KV block."""
        return self._refs[block]

    def weights_of(self, owner: Hashable) -> int:
        """Blocks of one owner's weights; 0 when it has none."""
        return sum(blocks for _, blocks in self._weights.get(owner, ()))

    # ------------------------------------------------------------------------------------- KV blocks

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each, free ones first. The caller has looked at `available`."""
        assert count <= self.available, f"{count} blocks wanted, {self.available} available"
        taken, state, refs, top = [], self._state, self._refs, self._top
        for _ in range(min(count, self._counts[FREE])):
            top = state.rfind(FREE, 0, top)  # everything above was seen to be taken
            state[top], refs[top] = KV, 1
            taken.append(top)
        self._top = top
        self._counts[FREE] -= len(taken)
        self._counts[KV] += len(taken)
        for block in [*islice(self._cached, count - len(taken))]:
            self._uncache(block)
            self._set(block, KV)
            refs[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """One more table names `block`, which is held or cached."""
        if self._state[block] == CACHED:
            del self._cached[block]
            self._set(block, KV)
        assert self._state[block] == KV, f"block {block} holds no KV"
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One table less names each of `blocks`, given in table order: its head stays cached longest."""
        for block in reversed(list(blocks)):
            assert self._refs[block] > 0, f"block {block} is not held"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self.prefix:
                self._set(block, CACHED)
                self._cached[block] = None
            else:
                self._set(block, FREE)

    def _uncache(self, block: int) -> None:
        """Forget what a cached block holds; the caller says whose it is now."""
        del self._cached[block]
        self.prefix.remove(block)

    def _set(self, block: int, state: int) -> None:
        self._counts[self._state[block]] -= 1
        self._counts[state] += 1
        self._state[block] = state
        if state == FREE:
            self._top = max(self._top, block + 1)

    # ------------------------------------------------------------------------------------- weights

    def place(
        self, owner: Hashable, sizes: Sequence[int], former: Sequence[int] | None = None
    ) -> Placement | None:
        """Give `owner` one run of blocks per segment; `sizes` in blocks. None when it cannot be done.

        former: where the segments lay before, taken again where possible, so that whatever was captured
        with those addresses stays valid. Held KV blocks in the way move: the caller renames them in the block
        tables and tells the worker before it uses the placement.
        """
        assert owner not in self._weights, f"{owner} has weights already"
        if sum(sizes) > self.available:
            return None
        plan = _PlacementPlan(self._state.translate(_CACHED_IS_FREE))
        starts = [-1] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            wish = former[index] if former is not None else None
            start = plan.segment(sizes[index], wish)
            if start is None:
                return None
            starts[index] = start
        self._commit(owner, tuple(zip(starts, sizes, strict=True)), plan.moves)
        return Placement(tuple(starts), tuple(plan.moves))

    def fits(self, sizes: Sequence[int], without: Iterable[Hashable], kv_stays: bool) -> bool:
        """Whether `place` could succeed once those in `without` have left (and all KV, unless it stays)."""
        state = self._state.translate(_CACHED_IS_FREE if kv_stays else _KV_IS_FREE)
        for owner in without:
            for start, blocks in self._weights[owner]:
                state[start : start + blocks] = bytes(blocks)
        if sum(sizes) > state.count(FREE):
            return False
        plan = _PlacementPlan(state)
        return all(plan.segment(blocks, None) is not None for blocks in sorted(sizes, reverse=True))

    def _commit(
        self, owner: Hashable, runs: tuple[tuple[int, int], ...], moves: list[tuple[int, int]]
    ) -> None:
        for src, dst in moves:
            if self._state[dst] == CACHED:
                self._uncache(dst)
            self._set(dst, KV)
            self._refs[dst], self._refs[src] = self._refs[src], 0
            if src in self.prefix:
                self.prefix.rename(src, dst)
            self._set(src, FREE)
        for start, blocks in runs:
            for block in range(start, start + blocks):
                if self._state[block] == CACHED:
                    self._uncache(block)
                self._set(block, WEIGHTS)
        self._weights[owner] = runs

    def free_weights(self, owner: Hashable) -> None:
        """The owner's runs belong to nobody again."""
        for start, blocks in self._weights.pop(owner):
            for block in range(start, start + blocks):
                self._set(block, FREE)

    # ------------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        """Every block has exactly one state, and all books agree."""
        self.prefix.check()
        assert len(self._state) == self.capacity
        assert self._counts == [self._state.count(s) for s in (FREE, CACHED, KV, WEIGHTS)]
        assert self._state.find(FREE, self._top) < 0, "a free block above the mark would never be found"
        owned = [b for runs in self._weights.values() for s, n in runs for b in range(s, s + n)]
        assert len(owned) == len(set(owned)) == self._counts[WEIGHTS], "weights overlap"
        assert all(self._state[b] == WEIGHTS for b in owned)
        for block, state in enumerate(self._state):
            assert (self._refs[block] > 0) == (state == KV), f"block {block}: {self._refs[block]} refs"
            assert (block in self._cached) == (state == CACHED)
            if state == CACHED:
                assert block in self.prefix
            elif block in self.prefix:
                assert state == KV


class _PlacementPlan:
    """Places segments on a copy of the states, where cached counts as free; nothing is real until commit."""

    def __init__(self, state: bytearray) -> None:
        self.state = state
        self.moves: list[tuple[int, int]] = []

    def segment(self, blocks: int, wish: int | None) -> int | None:
        start = self._free_run(blocks, wish)
        if start is None:
            if self.state.translate(_KV_IS_FREE).find(bytes(blocks)) < 0:
                return None  # weights are in the way everywhere: spares the search below
            start = self._window(blocks)
            if start is None or not self._clear(start, blocks):
                return None
        self.state[start : start + blocks] = bytes([WEIGHTS]) * blocks
        return start

    def _free_run(self, blocks: int, wish: int | None) -> int | None:
        run = bytes(blocks)  # FREE is 0
        if wish is not None and self.state[wish : wish + blocks] == run:
            return wish
        start = self.state.find(run)
        return start if start >= 0 else None

    def _window(self, blocks: int) -> int | None:
        """The run without weights that has the fewest held blocks; the lowest of equals."""
        best, best_held = None, blocks + 1
        held = length = 0
        for block, state in enumerate(self.state):
            if state == WEIGHTS:
                held = length = 0
                continue
            held += state == KV
            length += 1
            if length > blocks:
                held -= self.state[block - blocks] == KV
                length = blocks
            if length == blocks and held < best_held:
                best, best_held = block - blocks + 1, held
        return best

    def _clear(self, start: int, blocks: int) -> bool:
        """Move held blocks of the window to the highest free blocks outside it."""
        end = start + blocks
        for src in range(start, end):
            if self.state[src] != KV:
                continue
            dst = self.state.rfind(FREE, end)
            if dst < 0:
                dst = self.state.rfind(FREE, 0, start)
            if dst < 0:
                return False
            self.moves.append((src, dst))
            # A block moves once: with WEIGHTS here no later window takes dst, so moves never form chains
            # and the worker may copy them in any grouping.
            self.state[dst] = WEIGHTS
        return True

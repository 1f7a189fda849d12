"""The memory of one replica, rank by rank.

Owns what it means to have the same amount on every device of a tensor-parallel group: a request has a block
table per rank, all of one length, and each rank's arena chooses its own blocks and knows a prefix as that
rank's alone. Must not know requests. A replica on one device is a group of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from seallmd.core.arena import Arena

Tables = tuple[list[int], ...]


class Ranks:
    """The arenas of a group, in rank order."""

    def __init__(self, arenas: Sequence[Arena]) -> None:
        self.arenas = tuple(arenas)

    @property
    def available(self) -> int:
        """Blocks that can be had on every rank at once."""
        return min([arena.available for arena in self.arenas])

    def take(self, blocks: int) -> Tables:
        """So many blocks on every rank. The caller has looked at `available`."""
        return tuple([arena.take(blocks) for arena in self.arenas])

    def release(self, tables: Tables) -> None:
        """Each rank's blocks are named by one table less."""
        for arena, table in zip(self.arenas, tables, strict=True):
            arena.release(table)

    def share_prefix(self, root: Hashable, tokens: Sequence[int], run_tokens: int, run_blocks: int) -> Tables:
        """Blocks of the longest prefix of `tokens` that every rank still knows; shared from now on."""
        found = [
            arena.prefix.match(own, tokens, run_tokens, run_blocks)
            for arena, own in zip(self.arenas, self.roots(root), strict=True)
        ]
        length = min(map(len, found))
        tables = tuple(table[:length] for table in found)
        for arena, table in zip(self.arenas, tables, strict=True):
            for block in table:
                arena.share(block)
        return tables

    def roots(self, root: Hashable) -> list[Hashable]:
        """What the first entry of each rank's prefix index has as its parent.

        A device may come back as another rank, or as one of another number: what it still knows from before
        is KV of other heads.
        """
        ranks = len(self.arenas)
        return [(root, rank, ranks) for rank in range(ranks)]

    def parents(self, root: Hashable, tables: Tables) -> list[Hashable]:
        """What the next entry of each rank's prefix index has as its parent, after these shared blocks."""
        return [
            arena.prefix.parent_of(table[-1]) if table else own
            for arena, own, table in zip(self.arenas, self.roots(root), tables, strict=True)
        ]

    def index(
        self, parents: list[Hashable], tables: Tables, at: int, tokens: tuple[int, ...], run_blocks: int
    ) -> None:
        """Let others share the run of blocks at `at` of each table; it holds `tokens`. Moves `parents` on."""
        for rank, (arena, table) in enumerate(zip(self.arenas, tables, strict=True)):
            run = table[at : at + run_blocks]
            parents[rank] = arena.prefix.insert_run(parents[rank], tokens, run)

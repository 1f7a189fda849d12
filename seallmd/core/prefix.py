"""Which KV block holds which prefix: the index behind prefix reuse.

Owns the map from (what came before, the tokens of one block) to a block. Must not know who uses a block or
whether it is free: that is `core.arena`. Keys are the tokens themselves and the identity of the parent
entry, not a digest of them: two different prefixes can never share a block by a hash collision.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class PrefixIndex:
    """Full KV blocks by content. A chain starts at a root (service, salt, rank): nothing is shared across."""

    def __init__(self) -> None:
        self._block: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._entry: dict[int, tuple[tuple[Hashable, tuple[int, ...]], int]] = {}
        self._next_id = 0

    def __contains__(self, block: int) -> bool:
        return block in self._entry

    def __len__(self) -> int:
        return len(self._entry)

    def match(self, root: Hashable, tokens: Sequence[int], run_tokens: int, run_blocks: int = 1) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`, in order; whole runs only.

        A run is the blocks that hold the same `run_tokens` tokens: one, or one per layer.
        """
        found: list[int] = []
        parent = root
        for end in range(run_tokens, len(tokens) + 1, run_tokens):
            key = tuple(tokens[end - run_tokens : end])
            for _ in range(run_blocks):
                block = self._block.get((parent, key))
                if block is None:
                    return found[: len(found) // run_blocks * run_blocks]
                found.append(block)
                parent, key = self._entry[block][1], ()
        return found

    def parent_of(self, block: int) -> Hashable:
        """What the entry after `block` names as its parent."""
        return self._entry[block][1]

    def insert(self, parent: Hashable, tokens: tuple[int, ...], block: int) -> Hashable:
        """Note that `block` holds `tokens` after `parent`; returns the parent for the next block.

        When another block already holds the same, that one stays, and the chain goes on from it.
        """
        key = (parent, tokens)
        known = self._block.get(key)
        if known is not None:
            return self._entry[known][1]
        self._next_id += 1
        self._block[key] = block
        self._entry[block] = (key, self._next_id)
        return self._next_id

    def insert_run(self, parent: Hashable, tokens: tuple[int, ...], blocks: Sequence[int]) -> Hashable:
        """Note that a run of blocks holds `tokens`: the first by the tokens, the others by their place."""
        for block in blocks:
            parent = self.insert(parent, tokens, block)
            tokens = ()
        return parent

    def remove(self, block: int) -> None:
        """Forget what `block` holds. Entries behind it become unreachable and leave as their blocks do."""
        key, _ = self._entry.pop(block)
        del self._block[key]

    def rename(self, src: int, dst: int) -> None:
        """The contents of `src` now lie in `dst`."""
        key, identity = self._entry.pop(src)
        self._entry[dst] = (key, identity)
        self._block[key] = dst

    def check(self) -> None:
        """Every block is found by its own key, and by no other."""
        assert len(self._block) == len(self._entry)
        for block, (key, _) in self._entry.items():
            assert self._block[key] == block

"""Tensor-parallel groups in virtual time: a step begins when every rank has come to it.

Owns who waits for whom, and which groups a fault has broken. Must not know what a step does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from seallmd.core.messages import Group

Start = Callable[[float], None]


class Meetings:
    """Where the ranks of all groups of a world wait for each other."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], list[tuple[float, Start]]] = defaultdict(list)
        self._broken: set[int] = set()

    def is_broken(self, group: Group) -> bool:
        """Whether a rank is gone, or failed: no step of the group succeeds any more."""
        return group.id in self._broken

    def join(self, group: Group, step: int, seconds: float, start: Start) -> None:
        """A rank has come to a step that would take it `seconds`; `start` is told how long it takes all."""
        waiting = self._waiting[group.id, step]
        waiting.append((seconds, start))
        if len(waiting) == group.ranks or self.is_broken(group):
            self._begin(group.id, step)

    def break_up(self, group: Group) -> None:
        """A rank is gone or failed: those who wait for it go on, to fail."""
        self._broken.add(group.id)
        for identity, step in [key for key in self._waiting if key[0] == group.id]:
            self._begin(identity, step)

    def _begin(self, identity: int, step: int) -> None:
        waiting = self._waiting.pop((identity, step))
        seconds = max(seconds for seconds, _ in waiting)
        for _, start in waiting:
            start(seconds)

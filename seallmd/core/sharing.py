"""Which services may not be on one device at the same time.

Owns the meaning of `[[group]]`. Must not know devices: `residency` keeps the services apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from seallmd.core.settings import GroupSettings


class Sharing:
    """What the groups say of two services. Asked often, so answers are remembered."""

    def __init__(self, groups: Sequence[GroupSettings]) -> None:
        self.groups = tuple(groups)
        self._known: dict[tuple[str, str], bool] = {}

    def apart(self, one: str, other: str) -> bool:
        """Whether two services may not be on one device. Symmetric; nobody is apart from itself."""
        if one == other:
            return False
        pair = (one, other) if one < other else (other, one)
        if pair not in self._known:
            self._known[pair] = any(_forbids(group, pair) for group in self.groups)
        return self._known[pair]


def _forbids(group: GroupSettings, pair: tuple[str, str]) -> bool:
    inside = sum(name in group.services for name in pair)
    return (inside == 2 and not group.share_members) or (inside == 1 and not group.share_others)

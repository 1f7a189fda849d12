"""Services that leave when nobody has asked for them for a while (`idle_seconds`, Ollama's keep_alive).

Owns the clock of idleness. Must not know why else a service comes or goes.
"""

from __future__ import annotations

from math import inf

from seallmd.core.room import Room
from seallmd.core.service import Service, Stage
from seallmd.core.state import NodeState


class IdleLimits:
    """Evicts what has been idle for too long, on the shared state."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._room = room
        self._look_at = 0.0  # nobody can be due before; inf: nobody has a limit
        self._copies = 0

    def changed(self) -> None:
        """Limits are no longer what they were: look again."""
        self._look_at = 0.0

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return self.next_wakeup()

    def next_wakeup(self) -> float:
        """When somebody may be due; inf: never."""
        return self._look_at

    def settle(self) -> None:
        """Evict who is due. Cheap while nobody can be: most events end here."""
        came = self._state.copies != self._copies
        if not came and self._state.now < self._look_at:
            return
        self._copies = self._state.copies
        ends = []
        for service in self._state.services.values():
            seconds = _limit(service)
            if not seconds or not service.replicas:
                continue
            # Who is busy now will have been idle for so long at that time at the earliest. That may be now:
            # clients choose the limit.
            end = idle_since(service, self._state.now) + seconds
            if end <= self._state.now and not _is_busy(service):
                self._let_go(service, seconds)
            else:
                ends.append(end)
        self._look_at = min(ends, default=inf)

    def _let_go(self, service: Service, seconds: float) -> None:
        service.evicted = True  # no plan is to bring it back
        for replica in list(service.replicas):
            self._room.evict(replica, f"idle for {seconds:g} s")


def _limit(service: Service) -> float:
    """Seconds after which it leaves; 0 = never."""
    if service.settings.pinned:
        return 0.0
    return service.settings.idle_seconds if service.keep_seconds is None else service.keep_seconds


def idle_since(service: Service, now: float) -> float:
    """Since when nobody has wanted anything of it; now, while somebody does."""
    if _is_busy(service):
        return now
    return max([service.idle_since, *(replica.since for replica in service.replicas)])


def _is_busy(service: Service) -> bool:
    return service.demand or any(r.running or r.stage is not Stage.RESIDENT for r in service.replicas)


def expires_seconds(service: Service, now: float) -> float | None:
    """Until it leaves for being idle, if nobody asks for it; None when it does not, or is not there."""
    seconds = _limit(service)
    if not seconds or not service.replicas:
        return None
    return max(0.0, idle_since(service, now) + seconds - now)

"""Requests that outgrow their device, on machines whose devices are not equal.

Owns having a service leave for a request's sake. Must not place it: once it has left, `residency` brings it
in where its longest request has room. Only now, although the limit of a request is known from the beginning:
most end long before they reach theirs, and nobody would live on the smaller devices.
"""

from __future__ import annotations

from math import inf

from seallmd.core.places import Places
from seallmd.core.room import Room
from seallmd.core.service import Service, Stage
from seallmd.core.state import NodeState
from seallmd.core.worth import drain_seconds


class Outgrown:
    """Looks after `NodeState.stranded`."""

    def __init__(self, state: NodeState, places: Places, room: Room) -> None:
        self._state = state
        self._room = room
        self._places = places

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return -inf if self._state.stranded else inf

    def settle(self) -> None:
        """Have services leave the devices that a waiting request of theirs has outgrown."""
        if not self._state.stranded:
            return
        stranded, self._state.stranded = self._state.stranded, set()
        for name, service in self._state.services.items():
            if name in stranded:
                self._move(service)

    def _move(self, service: Service) -> None:
        needs = [service.blocks_for(len(request.tokens) + 1) for request in service.waiting.values()]
        longest = max(needs, default=0)
        if self._holds(service, longest):
            return  # that one takes it
        most = self._places.most_kv_anywhere(service)
        if most < longest:
            if not self._state.awaits_devices:
                self._fail_longer(service, most)
                return
            longest = max((blocks for blocks in needs if blocks <= most), default=0)
            if self._holds(service, longest):
                return
        for replica in service.replicas:
            if replica.stage is Stage.RESIDENT:
                replica.leaving = True
                seconds = drain_seconds(self._state, service, replica)
                self._room.drain(replica, admit_below=0, seconds=seconds)

    def _holds(self, service: Service, blocks: int) -> bool:
        """Whether a replica could give so many blocks of KV to one request."""
        return any(self._state.most_kv_blocks_of(replica) >= blocks for replica in service.replicas)

    def _fail_longer(self, service: Service, most: int) -> None:
        """End the waiting requests that no place has blocks enough for."""
        for request in list(service.waiting.values()):
            if service.blocks_for(len(request.tokens) + 1) > most:
                error = "no device has the memory left for this request"
                self._state.finish(request, "failed", error, code="out_of_memory", status=503)

"""Where services could be: groups of devices, and what those could hold.

Owns the question what fits, now or ever, with who is there in the way or gone. Must not move anything
(`residency`), nor know why a service is to come in.

A place is a group of devices, in rank order; for most services a group of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy

from seallmd.core import dedicated
from seallmd.core.service import Service
from seallmd.core.state import Device, NodeState

Place = Sequence[Device]


class Places:
    """Answers on the shared state; it changes nothing but how a service is split, in `misfit`."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    def of(self, service: Service, ranks: int = 0, *, closed: bool = False) -> list[Place]:
        """Groups of running devices that a service may come in on: those configured, else neighbours.

        Neighbours alone, because neighbouring indexes are what machines connect best, and because all the
        combinations of 32 devices are too many. closed: also those that an operator wants empty, for what
        must not depend on that.
        """
        return list(self._running(service, ranks or service.ranks, closed=closed))

    def _running(self, service: Service, ranks: int, *, closed: bool) -> Iterator[Place]:
        for group in self._groups(service, ranks):
            if len(group) == ranks and all(d.arena is not None and (closed or not d.closed) for d in group):
                yield group

    def _groups(self, service: Service, ranks: int) -> Iterator[Place]:
        """Groups of devices, whatever state those are in."""
        devices = self._state.devices
        if dedicated.is_dedicated(self._state):
            yield dedicated.own_devices(self._state, service, ranks)
            return
        wanted: Iterable[Sequence[int]] = service.settings.devices or (
            range(first, first + ranks) for first in range(len(devices) - ranks + 1)
        )
        for group in wanted:
            yield [devices[index] for index in group if index in devices]

    def _least_kv_blocks(self, service: Service) -> int:
        """KV that must fit beside the weights: one request of an explicit context, or a short one."""
        assert service.shape is not None
        return service.blocks_for(service.settings.context or min(service.shape.context, 256))

    def need(self, service: Service) -> int:
        """Blocks that a service needs on each of its devices at least."""
        return self._state.weights_blocks(service) + self._least_kv_blocks(service)

    def _most_kv(self, service: Service, place: Place) -> int:
        """KV blocks that it could have on each device of a place if all left that can."""
        return min(self._state.most_kv_blocks(device, service) for device in place)

    def holds_waiting(self, service: Service, place: Place) -> bool:
        """Whether a place could hold the longest request that waits, split over so many devices.

        What was admitted by the limit of a larger group must not end up where it has no room.
        """
        split = service
        if len(place) != service.ranks:
            split = copy(service)
            split.split_over(len(place), self._state.settings)
        longest = max((r.prompt + r.max_tokens for r in service.waiting.values()), default=0)
        return split.run_tokens > 0 and self._most_kv(split, place) >= split.blocks_for(longest)

    def context_limit(self, service: Service) -> int:
        """Most tokens (prompt and output) that a request of the service can ever have.

        A worker that starts anew must not make it less meanwhile: what is turned away is not asked again.
        """
        assert service.shape is not None
        most, longest = -1, service.shape.context
        for place in self._groups(service, service.ranks):
            coming = all(device.arena is not None or self._state.awaits(device) for device in place)
            if len(place) != service.ranks or not coming:
                continue
            if any(device.arena is None and not device.arena_bytes for device in place):
                return longest  # nobody knows yet
            blocks = min(self._kv_in_time(service, device) for device in place)
            most = max(most, blocks // service.run_blocks * service.run_tokens)
            if most >= longest:  # asked for with every request, and on most machines of the first place
                break
        return longest if most < 0 else min(longest, most)

    def _kv_in_time(self, service: Service, device: Device) -> int:
        """KV blocks that it could have on a device, which is as it was before when it comes back."""
        if device.arena is not None:
            return self._state.most_kv_blocks(device, service)
        capacity = device.arena_bytes // self._state.settings.block_bytes
        return max(0, capacity - self._state.weights_blocks(service))

    def able(self, service: Service) -> list[Place]:
        """Places where the service has room once all have left that can, and nobody stays that bars it."""
        least = self._least_kv_blocks(service)
        return [
            place
            for place in self.of(service)
            if self._most_kv(service, place) >= least and not any(self._barred(d, service) for d in place)
        ]

    def best(self, service: Service) -> list[Place]:
        """Those of them with room for whatever the waiting requests may become, else for what they are now.

        In any other it would be found to have outgrown its place at once, and would come and go without end.
        """
        able = self.able(service)
        if found := [place for place in able if self.holds_waiting(service, place)]:
            return found
        room = [self._most_kv(service, place) for place in able]
        now = [service.blocks_for(len(request.tokens) + 1) for request in service.waiting.values()]
        least = max((blocks for blocks in now if blocks <= max(room, default=0)), default=0)
        return [place for place, blocks in zip(able, room, strict=True) if blocks >= least]

    def most_kv_anywhere(self, service: Service) -> int:
        """KV blocks that it could have on each device of the best of those places."""
        return max((self._most_kv(service, place) for place in self.able(service)), default=0)

    def _barred(self, device: Device, service: Service) -> bool:
        """Whether a pinned service that it may not be beside is on a device."""
        strangers = self._state.strangers(device, service.name)
        return any(self._state.services[replica.service].settings.pinned for replica in strangers)

    def misfit(self, service: Service, ranks: int) -> str:
        """Why no place can ever hold the service split over so many ranks; empty when one can."""
        assert service.shape is not None
        try:
            service.split_over(ranks, self._state.settings)
        except ValueError as error:
            return str(error)
        service.former.clear()
        unit = self._state.settings.block_bytes
        if service.run_tokens == 0:
            return (
                f"one token's KV takes {service.shape.kv_bytes_per_token // ranks} bytes, a block has {unit}"
            )
        places = self.of(service, closed=True)
        if not places:
            if groups := service.settings.devices:
                own = [list(group) for group in groups]
                return f"its devices, {own}, are none of the {len(self._state.devices)} here"
            return f"it needs {ranks} devices, and this machine has {len(self._state.devices)} to offer it"
        need = self.need(service)
        most = max(min(device.arena.capacity for device in place if device.arena) for place in places)
        if need <= most:
            return ""
        need_mib, most_mib = need * unit >> 20, most * unit >> 20
        return f"needs {need_mib} MiB (weights and one context), the largest device has {most_mib} MiB"


def available(place: Place) -> int:
    """Blocks that can be had at once on each device of a place."""
    return min(device.arena.available for device in place if device.arena is not None)

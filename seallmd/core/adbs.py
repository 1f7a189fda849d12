"""ADBS, the adaptive batch scheduling of MuxServe: the baseline `adbs`.

Owns the order of services (whoever has prompts to run goes before those that only decode, each in turn) and
the quotas of KV that services have on a device. Must not form steps (`batcher`).

After Duan et al., MuxServe (ICML 2024), section 3.3. Reconstructed where the paper leaves it open or has
other hardware in mind: it runs prompts and decodes beside each other on parts of a GPU, here a device runs
one step at a time and a step mixes both; quotas begin equal; an idle service keeps a tenth of an equal share,
so that it can grow again; quotas bind admission, not the growth of what runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from seallmd.core.request import Request
from seallmd.core.service import Replica
from seallmd.core.state import Device, NodeState

ADAPT_SECONDS = 8.0
BUSY = 0.9  # of its quota: a service that uses so much and has a queue gets more
GROWTH = 0.1  # of its quota, in one period
KEPT = 0.1  # of an equal share, that nobody gives away


def adapted(
    quotas: Mapping[str, float], used: Mapping[str, int], queued: Collection[str]
) -> dict[str, float]:
    """Quotas after one period, of the same sum: who is short gets more from those who have it to spare.

    quotas, used: bytes of KV by service. queued: services with waiting requests.
    """
    kept = KEPT * sum(quotas.values()) / max(1, len(quotas))
    wants = {n: GROWTH * quota for n, quota in quotas.items() if n in queued and used[n] >= BUSY * quota}
    spares = {n: max(0.0, quota - max(used[n], kept)) for n, quota in quotas.items() if n not in wants}
    wanted, spare = sum(wants.values()), sum(spares.values())
    moved = min(wanted, spare)
    if moved <= 0:
        return dict(quotas)
    return {
        n: quota + moved * (wants[n] / wanted if n in wants else -spares[n] / spare)
        for n, quota in quotas.items()
    }


@dataclass(slots=True)
class _Pool:
    """KV of one device. quotas: bytes by resident service; their sum is all that weights leave."""

    quotas: dict[str, float] = field(default_factory=dict)
    adapted_at: float = 0.0


class Adbs:
    """The policy of one node, with its quotas."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def order(self, state: NodeState, device: Device, ready: Sequence[Replica]) -> list[Replica]:
        """Services with prompts to run first; among equals, the one whose last step is longest ago."""
        return sorted(ready, key=lambda r: (not self._has_prompt(state, device, r), r.used))

    def admits(self, state: NodeState, device: Device, replica: Replica, request: Request) -> bool:
        """Whether the KV of a waiting request is within its service's quota on this device.

        A service that runs nothing there may always begin: else a long request could wait for ever.
        """
        if not replica.running:
            return True
        token = _token_bytes(state, replica.service)
        quota = self.quotas(state, device)[replica.service]
        return _used(state, replica) + token * len(request.tokens) <= quota

    def quotas(self, state: NodeState, device: Device) -> dict[str, float]:
        """Bytes of KV by service as of now; adapted when a period is over."""
        assert device.arena is not None
        pool = self._pools.setdefault(device.index, _Pool())
        bytes_ = (device.arena.capacity - device.arena.weights) * state.settings.block_bytes
        if pool.quotas.keys() != device.replicas.keys():
            pool.quotas = _among(device.replicas.keys(), pool.quotas, bytes_)
            pool.adapted_at = state.now
        elif state.now >= pool.adapted_at + ADAPT_SECONDS:
            used = {name: _used(state, replica) for name, replica in device.replicas.items()}
            queued = [name for name in device.replicas if state.services[name].waiting]
            pool.quotas = adapted(pool.quotas, used, queued)
            pool.adapted_at = state.now
        return pool.quotas

    def _has_prompt(self, state: NodeState, device: Device, replica: Replica) -> bool:
        """Whether the replica's next step would run tokens of a prompt."""
        if any(request.pending > 1 for request in replica.running.values()):
            return True
        waiting = next(iter(state.services[replica.service].waiting.values()), None)
        if waiting is None or (waiting.saved is not None and waiting.saved.within_reach(replica.devices)):
            return False  # whose KV comes back from host memory would only decode
        return self.admits(state, device, replica, waiting)


def _among(names: Collection[str], known: Mapping[str, float], bytes_: int) -> dict[str, float]:
    """Quotas of those who are resident now: in the proportions known, newcomers with the mean of them."""
    kept = [known[name] for name in names if name in known]
    mean = sum(kept) / len(kept) if kept else 1.0
    parts = {name: known.get(name, mean) for name in names}
    return {name: bytes_ * part / sum(parts.values()) for name, part in parts.items()}


def _used(state: NodeState, replica: Replica) -> int:
    """Bytes of KV that a replica's requests have written or are about to."""
    tokens = sum(request.scheduled for request in replica.running.values())
    return tokens * _token_bytes(state, replica.service)


def _token_bytes(state: NodeState, name: str) -> int:
    service = state.services[name]
    return state.settings.block_bytes * service.run_blocks // service.run_tokens

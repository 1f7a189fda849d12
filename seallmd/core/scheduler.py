"""Which replica of a device steps next.

Owns the policies by name, most of them pure choices among replicas that have work, and the doubling budget.
Must not form steps (`batcher`) nor move models (`residency`). The policy is chosen in `[policy] scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from seallmd.core import dedicated
from seallmd.core.adbs import Adbs
from seallmd.core.outlook import outlook
from seallmd.core.request import Request
from seallmd.core.service import Replica
from seallmd.core.state import Device, NodeState

Order = Callable[[NodeState, Device, Sequence[Replica]], list[Replica]]
Admits = Callable[[NodeState, Device, Replica, Request], bool]


def round_robin(_state: NodeState, device: Device, ready: Sequence[Replica]) -> list[Replica]:
    """The services in turn, beginning after the one that stepped last."""
    names = [replica.service for replica in ready]
    split = names.index(device.last_served) + 1 if device.last_served in names else 0
    return [*ready[split:], *ready[:split]]


def fcfs(state: NodeState, _device: Device, ready: Sequence[Replica]) -> list[Replica]:
    """The service of the most senior request first, until that request is done."""

    def seniority(replica: Replica) -> int:
        service = state.services[replica.service]
        orders = [request.order for request in replica.running.values()]
        orders += list(service.waiting)[:1]
        return min(orders, default=state.orders)

    return sorted(ready, key=seniority)


def budget(state: NodeState, _device: Device, ready: Sequence[Replica]) -> list[Replica]:
    """The service whose next step is worth most for the time it takes (SeaLLM, by batch density).

    Each row is worth the share of its request's budget that the step gets done, times its slowdown so far
    to the power of `ageing`: the time since it arrived over the execution time that it has had. That is
    what clients notice, and it keeps the tail of the slowdown below that of taking turns (docs/log.md). The
    weight of the request's tier comes on top. A service that has had work for `max_gap_rounds` without a
    step goes first, the longest waiting of them, so that nobody waits without limit: a round is the time in
    which each service that has work would get one step. The literal rule, the service of the one best
    request, throws batching away, and a gap in seconds suits one size of model only (docs/log.md).
    """
    if len(ready) == 1:
        return list(ready)
    now, limits = state.now, state.settings.policy
    outlooks = {replica.service: outlook(state, replica) for replica in ready}
    gap = limits.max_gap_rounds * sum([each.seconds for each in outlooks.values()])

    def rank(replica: Replica) -> tuple[float, float]:
        expected = outlooks[replica.service]
        waits = now - expected.unserved_since
        worth = expected.worth(now, limits.ageing)
        return (-waits if waits > gap else 0.0, -worth / expected.seconds)

    return sorted(ready, key=rank)


def charge(request: Request, seconds: float) -> None:
    """A token was generated: charge it. Who has used up its budget falls in rank, by one twice as large.

    seconds: what a token costs (`ServiceProfile.token_seconds`).

    With p the execution time that a request really needs and b the first budget: at most
    max(0, ceil(log2(p / b))) doublings, and the last budget is below 2 * max(b, p). Several at once when a
    token costs more than the whole budget, which was set before the costs were learnt.
    """
    request.attained += seconds
    while request.attained > request.budget:
        request.budget *= 2
        request.doublings += 1


class Policy(NamedTuple):
    """What is asked of a policy.

    order: replicas of a device that have work, the one that is to step first. admits: whether a waiting
    request may be taken in, memory permitting.
    """

    order: Order
    admits: Admits


def _admits_all(_state: NodeState, _device: Device, _replica: Replica, _request: Request) -> bool:
    return True


def _adbs() -> Policy:
    quotas = Adbs()
    return Policy(quotas.order, quotas.admits)


# Makes the policy of one node, by its name in `[policy] scheduler`.
POLICIES: dict[str, Callable[[], Policy]] = {
    "budget": lambda: Policy(budget, _admits_all),
    "round-robin": lambda: Policy(round_robin, _admits_all),
    "fcfs": lambda: Policy(fcfs, _admits_all),
    "adbs": _adbs,
    dedicated.NAME: lambda: Policy(fcfs, _admits_all),  # one service on a device: any order would do
}

"""Which replica of a device steps next.

Owns the policies by name, most of them pure choices among replicas that have work, and the doubling budget.
Must not form steps (`batcher`) nor move models (`residency`). The policy is chosen in `[policy] scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

from seallmd.core import dedicated
from seallmd.core.adbs import Adbs
from seallmd.core.request import Request
from seallmd.core.state import Device, NodeState, Replica, Service

_HEAD_START = 0.1  # of its budget, that a request counts as having had: its slowdown does not begin endless

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
    what clients notice, and it keeps the tail of the slowdown below that of taking turns (docs/log.md). A
    service that has had work for `max_gap_rounds` without a step goes first, the longest waiting of them,
    so that nobody waits without limit: a round is the time in which each service that has work would get
    one step. The literal rule, the service of the one best request, throws batching away, and a gap in
    seconds suits one size of model only (docs/log.md).
    """
    if len(ready) == 1:
        return list(ready)
    worth = {replica.service: _next_step(state, replica) for replica in ready}
    gap = state.settings.policy.max_gap_rounds * sum(seconds for _, seconds in worth.values())

    def rank(replica: Replica) -> tuple[float, float]:
        waits = state.now - _unserved_since(state, replica)
        value, seconds = worth[replica.service]
        return (-waits if waits > gap else 0.0, -value / seconds)

    return sorted(ready, key=rank)


def _unserved_since(state: NodeState, replica: Replica) -> float:
    """Since when the replica has had work without a step."""
    # The first of each is the longest here, but for one that was preempted: that was served before.
    firsts = (replica.running.values(), state.services[replica.service].waiting.values())
    oldest = min(request.arrived for requests in firsts for request in islice(requests, 1))
    return max(replica.used, oldest)


def _next_step(state: NodeState, replica: Replica) -> tuple[float, float]:
    """Worth of the step that the replica would run next, and the seconds that it would take."""
    service, limits = state.services[replica.service], state.settings.policy
    profile, now, ageing = service.profile, state.now, limits.ageing
    assert profile is not None
    token, left = profile.token_seconds(), limits.step_tokens
    worth, tokens, context, rows = 0.0, 0, 0, 0
    # The node's innermost loop, over every request of every service (tools/bench_node.py).
    for request in islice(chain(replica.running.values(), service.waiting.values()), limits.max_rows):
        drawn, scheduled = request.drawn, request.scheduled
        if drawn >= request.max_tokens > 0 or not left:
            continue
        if request.saved is not None and request.saved.devices == replica.devices:
            scheduled = request.saved.tokens  # comes back without being computed again
        pending = request.prompt + drawn - scheduled
        if not pending:  # it is pooled, and its last row is on its way
            continue
        if pending == 1:
            gained, count = token, 1
        else:
            count = min(pending, left)
            gained = profile.prefill_seconds(pending) * count / pending
        had = max(request.attained, _HEAD_START * request.budget)
        worth += gained / request.budget * ((now - request.arrived) / had) ** ageing
        left -= count
        tokens += count
        context += scheduled + count
        rows += count == pending
    return worth, profile.costs.predict(tokens, context, rows)


def charge(request: Request, service: Service) -> None:
    """A token was generated: charge it. Who has used up its budget falls in rank, by one twice as large.

    With p the execution time that a request really needs and b the first budget: at most
    max(0, ceil(log2(p / b))) doublings, and the last budget is below 2 * max(b, p). Several at once when a
    token costs more than the whole budget, which was set before the costs were learnt.
    """
    assert service.profile is not None
    request.attained += service.profile.token_seconds()
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

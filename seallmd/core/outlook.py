"""What the next step of a replica would be, as far as that does not depend on the time.

Owns what the policy `budget` weighs for each replica at every step: the rows that it would run, and how long
that would take. It is looked up again only when something of the service has changed
(`Service.changed`), since most services of a device have not when one of them steps; `core.invariants`
compares what is kept with what would be found anew. Must not choose between replicas (`scheduler`).
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from seallmd.core.tiers import WEIGHTS

if TYPE_CHECKING:
    from seallmd.core.service import Replica
    from seallmd.core.state import NodeState

HEAD_START = 0.1  # of its budget, that a request counts as having had: its slowdown does not begin endless


class Outlook(NamedTuple):
    """A replica's next step, if it came now.

    rows: of each, the execution time that it gains its request per second of that request's budget, times the
    weight of its tier; when that arrived, and the execution time that it counts as having had. seconds: of
    the step. unserved_since: since when the replica has had work without a step.
    """

    rows: tuple[tuple[float, float, float], ...]
    seconds: float
    unserved_since: float

    def worth(self, now: float, ageing: float) -> float:
        """The sum over rows of (work done / budget) * slowdown so far ** ageing."""
        # The node's innermost loop, over every request of every service (tools/bench_node.py).
        worths: list[float] = [g * ((now - arrived) / had) ** ageing for g, arrived, had in self.rows]
        return sum(worths)


def outlook(state: NodeState, replica: Replica) -> Outlook:
    """Of a replica that has work."""
    known = state.services[replica.service].outlooks
    found = known.get(replica.copy)
    if found is None:
        found = known[replica.copy] = look(state, replica)
    return found


def look(state: NodeState, replica: Replica) -> Outlook:
    """The same, from what is there."""
    service, limits = state.services[replica.service], state.settings.policy
    profile, devices = service.profile, replica.devices
    assert profile is not None
    token, left = profile.token_seconds(), limits.step_tokens
    rows, tokens, context, drawing = [], 0, 0, 0
    for request in islice(chain(replica.running.values(), service.waiting.values()), limits.max_rows):
        drawn, scheduled = request.drawn, request.scheduled
        if drawn >= request.max_tokens > 0 or request.landing or not left:
            continue
        if request.saved is not None and request.saved.within_reach(devices):
            scheduled = request.saved.tokens  # comes back without being computed again
        pending = request.prompt + drawn - scheduled
        if not pending:  # it is pooled, and its last row is on its way
            continue
        if pending == 1:
            gained, count = token, 1
        else:
            count = min(pending, left)
            gained = profile.prefill_seconds(pending) * count / pending
        had = max(request.attained, HEAD_START * request.budget)
        rows.append((WEIGHTS[request.tier] * gained / request.budget, request.arrived, had))
        left -= count
        tokens += count
        context += scheduled + count
        drawing += count == pending
    # The first of each is the longest here of its tier, but for one that was preempted: that was served.
    firsts = (replica.running.values(), service.waiting.values())
    oldest = min(request.arrived for requests in firsts for request in islice(requests, 1))
    seconds = profile.costs.predict(tokens, context, drawing)
    return Outlook(tuple(rows), seconds, max(replica.used, oldest))

"""What it is worth that a service is resident, and when an absent one is worth more.

Owns the judgement alone; `residency` moves services. Everything is in request-seconds, the unit of a plan's
regret (`replacement`), and the rule is the same ski rental: what the newcomer's requests have waited grows;
once it has reached what those who would have to leave for it would lose, they are asked to. So a crowd of
waiters, or a light resident, makes a swap come early, and nobody swaps back and forth for a few requests.
On both sides a second counts as much as the operator says that the service is important.
Batch work counts for nothing beside other requests. Among itself it makes swaps rare: who came last and when
is all the same to it, and every swap costs all of it throughput.
"""

from __future__ import annotations

from math import inf

from seallmd.core.estimate import swap_seconds
from seallmd.core.request import Request
from seallmd.core.service import Replica, Service
from seallmd.core.state import NodeState

_LOOKS = 4  # in the time of one swap: how often it is looked at whether it is worth it by now
_LEAST_LOOK_SECONDS = 0.01
_BATCH_STAY = 20  # where batch work alone is at both ends, a swap has to be worth so many times what is lost


def stays_until(state: NodeState, replica: Replica) -> float:
    """Until when a replica may not be pushed out by another service.

    Where two are in demand and one fits, swaps take their share of the time: so a stay is measured in them.
    One that nobody asks for loses little by leaving, and who wants its memory would wait for nothing; unless
    its next request usually comes sooner than a swap takes, from a client that has just had an answer.
    """
    policy, service = state.settings.policy, state.services[replica.service]
    once, swaps = swap_seconds(state, service), policy.min_residency_swaps
    if replica.running or service.demand:
        return replica.since + min(swaps * once, max(once, policy.patience_seconds))
    least = min(swaps, 1.0) * once
    pause = 2 * service.pause_seconds if service.pause_seconds < least else 0.0
    return max(replica.since + least, service.idle_since + pause)


def waited(service: Service, now: float) -> float:
    """Weighted request-seconds that the requests of an absent service have waited for it to come.

    As if they had arrived at a steady rate: the queue is not walked through at every event.
    """
    if not service.waiting:
        return 0.0
    deferred = _only_deferred(service)
    first = next(iter(service.waiting.values()))
    last = next(r for r in reversed(service.waiting.values()) if r.deferred is deferred)
    count = service.urgent or service.deferred
    seconds = (2 * now - _since(service, first) - _since(service, last)) / 2
    return service.settings.importance * count * seconds


def _only_deferred(service: Service) -> bool:
    """Whether a service is wanted for batch work alone."""
    return service.deferred > 0 and not service.urgent and not service.load_tickets


def _since(service: Service, request: Request) -> float:
    """Since when a request has waited for its absent service; what it waited while that was there is past."""
    return max(request.arrived, service.left_at)


def loss(state: NodeState, replica: Replica, newcomer: Service) -> float:
    """Weighted request-seconds that are lost when a replica leaves for a newcomer, and comes back after it.

    Those that it runs or keeps waiting, and those that are going to arrive meanwhile, wait for as long as it
    is away: until the newcomer is in and it is back, at least. The last replica but one or more leaves its
    requests to the others, which take them when the newcomer comes.
    """
    service = state.services[replica.service]
    urgent = sum(not request.deferred for request in replica.running.values())
    if not _only_deferred(newcomer):
        running, waiting, stay = urgent, service.urgent, 1
    elif urgent or service.urgent:
        return inf
    else:
        running, waiting, stay = len(replica.running), len(service.waiting), _BATCH_STAY
    weight = stay * service.settings.importance
    if service.others(replica):
        return weight * running * swap_seconds(state, newcomer)
    away = swap_seconds(state, newcomer) + swap_seconds(state, service)
    return weight * away * (running + waiting + away * service.arrivals.value(state.now))


def asks_at(state: NodeState, service: Service, lost: float) -> float:
    """When to ask those to leave who would lose so much: now, or when to look at it again.

    At once for an operator, and whatever they lose once somebody has waited for `patience_seconds`; the
    patience of batch work has no end.
    """
    if service.load_tickets or waited(service, state.now) >= lost:
        return state.now
    look = max(_LEAST_LOOK_SECONDS, swap_seconds(state, service) / _LOOKS)
    if _only_deferred(service):
        return state.now + look
    oldest = next(iter(service.waiting.values()))
    patience = state.settings.policy.patience_seconds
    return max(state.now, min(_since(service, oldest) + patience, state.now + look))


def drain_seconds(state: NodeState, service: Service, leaving: Replica) -> float:
    """How long a replica that was asked to leave may still run its requests: as long as the swap takes.

    Batch work is not waited for by others.
    """
    if not _only_deferred(service) and all(request.deferred for request in leaving.running.values()):
        return 0.0
    return min(swap_seconds(state, service), state.settings.policy.patience_seconds)

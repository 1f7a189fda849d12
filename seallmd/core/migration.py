"""Moves running requests to another replica of their service, where their tokens come faster.

Owns this judgement and its clock. Must not know how KV travels (`NodeState.migrate`). After Llumnix (Sun et
al., OSDI 2024): requests are moved continuously, at little cost, because where they were sent was decided
before anybody knew how long they would be and who would come beside them. There a replica hands on requests
when it could give each of them only few further blocks (its freeness); here memory is shared by many
services, and what counts is how long each request waits for its next token: a move has to shorten that by
`migrate_gain` for all requests of both places together, and to repay what it costs. There the copy runs
beside the decoding, in stages; here a request pauses for one copy to host memory and back.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from seallmd.core.profile import ServiceProfile
from seallmd.core.request import Request
from seallmd.core.rounds import Part, Rounds
from seallmd.core.service import Replica, Service, Stage
from seallmd.core.state import NodeState

LOOK_SECONDS = 0.2  # Llumnix pairs every 0.05 s
REPAY = 2.0  # a move's gain has to be so many times what it costs: answers are not as long as expected


class _Move(NamedTuple):
    """requests: how many. gain: by which factor waits between two places shrink; saved: seconds a token."""

    former: Replica
    replica: Replica
    requests: int
    gain: float
    saved: float


class Migration:
    """Spreads running requests over the replicas of their services, on the shared state."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._looked_at = -inf
        self._spread: list[Service] = []  # that have several replicas

    def settle(self) -> None:
        """Look, often enough, whether requests would be better off elsewhere."""
        state = self._state
        self._spread = [service for service in state.services.values() if len(service.replicas) > 1]
        looks = self._spread and state.settings.policy.migrate
        if not looks or state.now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = state.now
        rounds = Rounds(state)
        for service in self._spread:
            if (move := self._best(rounds, service)) is not None:
                self._carry_out(service, move)
                rounds = Rounds(state)

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        looks = self._spread and self._state.settings.policy.migrate
        return self._looked_at + LOOK_SECONDS if looks else inf

    def _best(self, rounds: Rounds, service: Service) -> _Move | None:
        """The move of one service's requests that shortens waits most, if any does by enough."""
        there = [replica for replica in service.replicas if replica.stage is Stage.RESIDENT]
        if len(there) < 2 or service.suspects or any(request.landing for request in service.running):
            return None
        crowded = [replica for replica in there if replica.running and not rounds.is_best(replica)]
        found = [
            move
            for former in crowded
            for replica in there
            if former is not replica
            for move in self._moves(rounds, former, replica)
        ]
        best = max(found, key=lambda move: move.gain, default=None)
        return best if best is not None and best.gain >= self._state.settings.policy.migrate_gain else None

    def _moves(self, rounds: Rounds, former: Replica, replica: Replica) -> list[_Move]:
        """Some numbers of requests that could go from one replica to another: one, half the odds, all."""
        state = self._state
        devices = {device.index: device for device in (*state.group(former), *state.group(replica))}
        parts = rounds.parts_on(devices.values())
        before = rounds.wait_seconds(parts.values())
        if before < state.settings.policy.migrate_gain * rounds.least_seconds(parts.values()):
            return []
        here, most = len(former.running), self._room(former, replica)
        moves = []
        for count in {1, (here - len(replica.running) + 1) // 2, here}:
            if not 0 < count <= most:
                continue
            shifted = parts | {
                former.copy: _with(parts[former.copy], -count),
                replica.copy: _with(parts[replica.copy], count),
            }
            after = rounds.wait_seconds(shifted.values())
            moves.append(_Move(former, replica, count, before / after, before - after))
        return moves

    def _room(self, former: Replica, replica: Replica) -> int:
        """How many of a replica's requests another has memory for, without taking any from anybody."""
        going: list[Request] = []
        for request in _cheapest(former):
            going.append(request)
            if not self._state.has_room(replica, going):
                return len(going) - 1
        return len(going)

    def _carry_out(self, service: Service, move: _Move) -> None:
        state, profile = self._state, service.profile
        assert profile is not None
        requests = _cheapest(move.former)[: move.requests]
        pause = sum(map(state.copy_seconds, requests)) + len(requests) * profile.token_seconds()
        left = sum(_tokens_left(profile, request) for request in requests) / len(requests)
        if move.saved * left < REPAY * pause:
            return
        for request in requests:
            if not state.migrate(request, move.replica, f"tokens come {move.gain:.1f} times as fast so"):
                return


def _with(part: Part, more: int) -> Part:
    return part._replace(requests=part.requests + more)


def _cheapest(replica: Replica) -> list[Request]:
    """A replica's requests, the one with the least KV first (Llumnix's SR)."""
    return sorted(replica.running.values(), key=lambda r: (r.scheduled, -r.order))


def _tokens_left(profile: ServiceProfile, request: Request) -> float:
    """How many a request is expected to draw yet; one that is longer than usual may well go on."""
    drawn = len(request.tokens) - request.prompt
    usual = max(profile.output_tokens - drawn, profile.output_tokens / 4)
    return min(usual, request.max_tokens - drawn)

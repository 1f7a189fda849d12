"""Who is turned away at the door.

Owns the refusals that a request gets at once, in its client's words: a model that is not there, a queue that
is full, a context that is too short. Must not start anything. Early and cheap is the point: what is let in is
served well.
"""

from __future__ import annotations

from seallmd.core import events as ev
from seallmd.core.estimate import queue_seconds, retry_seconds, wait_seconds
from seallmd.core.places import Places
from seallmd.core.recovery import ALL_DOWN, DOWN_RETRY_SECONDS
from seallmd.core.service import Service
from seallmd.core.state import NodeState


class Door:
    """Looks at arrivals."""

    def __init__(self, state: NodeState, places: Places) -> None:
        self._state = state
        self._places = places

    def refusal(self, event: ev.Arrived) -> ev.Finish | None:
        """Why a request is not even queued; None when it is."""
        state = self._state

        def failed(error: str, code: str, status: int, retry_after: float = 0.0) -> ev.Finish:
            return ev.Finish(event.request, "failed", error, code, status, retry_after)

        service = state.services.get(event.service)
        if service is None or (service.outgoing and service.successor is None):
            return failed(f"model {event.service!r} does not exist", "model_not_found", 404)
        if state.draining:
            error = "the server is shutting down" if state.stopping else "the server takes no new requests"
            return failed(error, "shutting_down" if state.stopping else "draining", 503, 5.0)
        if service.outgoing:
            error = f"model {service.name!r} is being replaced"
            return failed(error, "model_loading", 503, queue_seconds(state, service))
        if service.closed:
            error = f"model {service.name!r} takes no new requests: an operator has drained it"
            return failed(error, "draining", 503, 5.0)
        if service.refused:
            error = f"model {service.name!r} cannot be served: {service.refused}"
            return failed(error, "model_unavailable", 503)
        if state.now < service.retry_at:
            error = f"model {service.name!r} could not be loaded: {service.trouble}"
            return failed(error, "model_unavailable", 503, service.retry_at - state.now)
        if event.tier != "batch" and (crowd := self._crowd(service, len(event.prompt))):
            return failed(crowd, "overloaded", 503, queue_seconds(state, service))
        if event.tier != "batch" and (wait := self._too_long(service)):
            return failed(wait, "overloaded", 503, retry_seconds(state, service))
        if service.shape is None:
            return failed(f"model {service.name!r} is still being examined", "model_loading", 503, 1.0)
        limit = self._places.context_limit(service)
        if limit < 1 and state.lost_at:
            error = f"model {service.name!r} cannot be served: {ALL_DOWN}"
            return failed(error, "model_unavailable", 503, DOWN_RETRY_SECONDS)
        if limit < 1:
            error = f"pinned services leave no room for model {service.name!r} on any device"
            return failed(error, "model_unavailable", 503)
        if len(event.prompt) + event.max_tokens > limit:
            error = (
                f"this model's context is {limit} tokens; the request has {len(event.prompt)} "
                f"in the prompt and wants {event.max_tokens} more"
            )
            return failed(error, "context_length_exceeded", 400)
        return None

    def _crowd(self, service: Service, prompt: int) -> str:
        """Which limit of waiting requests or tokens one more would break; empty when none."""
        state = self._state
        if service.urgent >= service.settings.max_waiting:
            return f"{service.urgent} requests wait for model {service.name!r} already"
        most = service.settings.max_waiting_tokens
        if most and service.waiting_tokens and service.waiting_tokens + prompt > most:
            return f"{service.waiting_tokens} tokens wait for model {service.name!r} already"
        tokens = sum(each.waiting_tokens for each in state.services.values())
        if tokens and tokens + prompt > state.settings.policy.max_waiting_tokens:
            return f"{tokens} tokens wait for models already"
        return ""

    def _too_long(self, service: Service) -> str:
        """For how long one more would have to wait, if that is longer than it may; empty when it is not."""
        longest = service.settings.max_wait_seconds
        if longest and service.urgent and (wait := wait_seconds(self._state, service)) > longest:
            return f"a request for model {service.name!r} would wait for {wait:.0f} s, {longest:g} at most"
        return ""

"""How long requests wait, and how long a client should before it asks again: rough, and honest about it.

Owns these guesses. Must not decide anything. A model that is absent has to be read (unless the host has its
image) and copied; a full queue has to move. What was measured goes before what is assumed.
"""

from __future__ import annotations

from seallmd.core.profile import ServiceProfile
from seallmd.core.request import Request
from seallmd.core.service import Image, Replica, Service, Stage
from seallmd.core.state import NodeState

READ_BYTES_PER_SECOND = 1e9  # from disk to the host's memory: as a good SSD; no worker measures it
_LEAST_SECONDS, _MOST_SECONDS = 1.0, 120.0  # openai-python does not believe longer ones
_LEAST_TOLD_SECONDS = 0.1  # of an expected wait, for it to be learnt from
_BIAS_WEIGHT, _MOST_BIAS = 0.05, 16.0


def swap_seconds(state: NodeState, service: Service) -> float:
    """Until an absent service with a host image is resident: what that took lately, or the link should take.

    Where it comes for the first time a worker builds its module tree as well, which says nothing of the next.
    """
    if known := service.return_seconds or service.last_swap_seconds:
        return known
    return sum(service.segments) / state.settings.roofline.copy_bytes_per_second


def coming_seconds(state: NodeState, service: Service) -> float:
    """Until the service is resident if nobody is in its way; 0 when it is."""
    if any(replica.stage is Stage.RESIDENT for replica in service.replicas):
        return 0.0
    copy = swap_seconds(state, service)
    read = 0.0 if service.image is Image.READY else service.image_bytes / READ_BYTES_PER_SECOND
    if service.progress is not None:
        stage, done, total = service.progress
        left = 1.0 - (done / total if total else 0.0)
        if stage == "copy":
            return copy * left
        return read * left + copy
    if service.replicas:  # under way, and nothing told yet
        return copy
    # An absent one waits for room as well, for as long as it takes until busy services are asked.
    return read + copy + (state.settings.policy.patience_seconds if service.waiting else 0.0)


def wait_seconds(state: NodeState, service: Service) -> float:
    """Until a request that arrived now would be begun: the way of its model, and those before it.

    Corrected by how far such guesses were off lately.
    """
    return coming_seconds(state, service) + service.wait_bias * queue_guess(state, service)


def queue_guess(state: NodeState, service: Service) -> float:
    """Until those who wait now have been begun, as far as costs tell; batch work is nobody's obstacle.

    Those for whom there is room are begun one after the other; each of the others waits until one has ended.
    """
    waiting, profile = service.urgent, service.profile
    if not waiting or profile is None:
        return 0.0
    free = sum(
        max(
            0.0,
            min(room_for(state, replica, profile), state.settings.policy.max_rows) - len(replica.running),
        )
        for replica in service.replicas
    )
    at_once = min(free, waiting)
    prefill = profile.prefill_seconds(round(service.waiting_tokens * at_once / waiting)) if at_once else 0.0
    return prefill + (waiting - at_once) / _begun_per_second(state, service, profile)


def begun(service: Service, request: Request, now: float) -> None:
    """A request waits no longer: learn from how long it did."""
    told = request.expected_wait >= _LEAST_TOLD_SECONDS and not request.deferred
    if told and not request.epoch:
        off = (now - request.arrived) / request.expected_wait
        service.wait_bias += _BIAS_WEIGHT * (min(max(off, 1 / _MOST_BIAS), _MOST_BIAS) - service.wait_bias)


def _begun_per_second(state: NodeState, service: Service, profile: ServiceProfile) -> float:
    """Requests that a service can take up in the long run, with as many at once as it has now."""
    if not service.replicas:
        return _per_second(profile, profile.rows)
    return sum(
        _per_second(profile, min(len(replica.running), room_for(state, replica, profile)))
        / _busy_on(state, replica)
        for replica in service.replicas
    )


def _per_second(profile: ServiceProfile, rows: float) -> float:
    """With so many at once: each takes its prompt's time, and its part of the steps that it shares."""
    rows = max(1.0, rows)
    context = profile.prompt_tokens + profile.output_tokens / 2
    decode = profile.output_tokens * profile.costs.predict(rows, rows * context) / rows
    return 1 / (profile.prefill_seconds(round(profile.prompt_tokens)) + decode)


def room_for(state: NodeState, replica: Replica, profile: ServiceProfile) -> float:
    """Requests of usual length that a replica's part of the memory holds to their end."""
    length = round(profile.prompt_tokens + profile.output_tokens)
    blocks = state.services[replica.service].blocks_for(length)
    return state.most_kv_blocks_of(replica) / _busy_on(state, replica) / max(1, blocks)


def _busy_on(state: NodeState, replica: Replica) -> int:
    """Services with work on a replica's device, itself among them."""
    neighbours = state.devices[replica.leader].replicas.values()
    return max(1, sum(bool(r.running or state.services[r.service].waiting) for r in neighbours))


def queue_seconds(state: NodeState, service: Service) -> float:
    """After how long a full queue will have room for one more, within what clients heed."""
    coming = coming_seconds(state, service)
    if coming or service.profile is None:
        return _within(coming)
    running = sum(1 for _ in service.running)
    each = service.profile.request_seconds(round(service.profile.prompt_tokens))
    return _within(each / max(1, running))


def retry_seconds(state: NodeState, service: Service) -> float:
    """After how long the wait will be as short as it may be, within what clients heed."""
    return _within(wait_seconds(state, service) - service.settings.max_wait_seconds)


def _within(seconds: float) -> float:
    return min(max(seconds, _LEAST_SECONDS), _MOST_SECONDS)

"""How long a client should wait before it asks again: rough, and honest about what it is made of.

Owns these guesses. Must not decide anything. A model that is absent has to be read (unless the host has its
image) and copied; a full queue has to move. What was measured goes before what is assumed.
"""

from __future__ import annotations

from seallmd.core.state import Image, NodeState, Service, Stage

READ_BYTES_PER_SECOND = 1e9  # from disk to the host's memory: as a good SSD; no worker measures it
_LEAST_SECONDS, _MOST_SECONDS = 1.0, 120.0  # openai-python does not believe longer ones


def coming_seconds(state: NodeState, service: Service) -> float:
    """Until the service is resident if nobody is in its way; 0 when it is."""
    if any(replica.stage is Stage.RESIDENT for replica in service.replicas):
        return 0.0
    copy = service.last_swap_seconds or (
        sum(service.segments) / state.settings.roofline.copy_bytes_per_second
    )
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


def queue_seconds(state: NodeState, service: Service) -> float:
    """After how long a full queue will have room for one more, within what clients heed."""
    coming = coming_seconds(state, service)
    if coming or service.profile is None:
        return _within(coming)
    running = sum(1 for _ in service.running)
    each = service.profile.request_seconds(round(service.profile.prompt_tokens))
    return _within(each / max(1, running))


def _within(seconds: float) -> float:
    return min(max(seconds, _LEAST_SECONDS), _MOST_SECONDS)

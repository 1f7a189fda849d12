"""Math threads that CPU devices lend each other.

Owns how many threads a step gets. The cores of a machine are shared out among its CPU devices. One that has
nothing to do lends its part to those that do, while the steps last that are sent meanwhile. GPUs have none
to lend. Must not know what runs.
"""

from __future__ import annotations

from seallmd.core.service import Stage
from seallmd.core.state import Device, NodeState

# A step on n times the threads takes 1 / n**GAIN of the time: two threads made steps that only decode, which
# wait for memory, 1.4 times as fast, those with prompts 1.8 times (docs/benchmarks.md). What is learnt of
# steps is as if nothing had been lent.
DECODE_GAIN, PROMPT_GAIN = 0.5, 0.87


def threads_for(state: NodeState, device: Device) -> int:
    """Threads for the step that a device is about to run; 0 where there is nothing to lend."""
    own = state.settings.threads
    if not own:
        return 0
    up = [other for other in state.devices.values() if other.arena is not None]
    busy = sum(other is device or _is_busy(other) for other in up)
    return own * (len(up) // busy)


def speedup(threads: int, own: int, *, prompts: bool) -> float:
    """How much faster a step is on `threads` than on its device's own. prompts: whether it has any."""
    if not own or not threads:
        return 1.0
    return float((threads / own) ** (PROMPT_GAIN if prompts else DECODE_GAIN))


def _is_busy(device: Device) -> bool:
    """Whether a device computes, or copies a model."""
    return bool(device.inflight) or any(r.stage is Stage.COPYING for r in device.replicas.values())

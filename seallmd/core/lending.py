"""Math threads that CPU devices lend each other.

Owns how many threads a step gets. The cores of a machine are shared out among its CPU devices. One that has
nothing to do lends its part to those that do, while the steps last that are sent meanwhile. GPUs have none
to lend. Must not know what runs.
"""

from __future__ import annotations

from seallmd.core.service import Stage
from seallmd.core.state import Device, NodeState

# On n times the threads, what a step takes whatever is in it goes n**FIXED_GAIN times as fast: it reads the
# weights, and the memory that one thread keeps busy has little to give to a second. What comes with rows and
# tokens is computed (docs/benchmarks.md). What is learnt of steps is as if nothing had been lent.
FIXED_GAIN, TOKEN_GAIN = 0.1, 0.88


def threads_for(state: NodeState, device: Device) -> int:
    """Threads for the step that a device is about to run; 0 where there is nothing to lend."""
    own = state.settings.threads
    if not own:
        return 0
    return threads_among(state, sum(other is device or _is_busy(other) for other in _up(state)))


def threads_among(state: NodeState, busy: int) -> int:
    """Threads of each device where so many of those that are up have something to do."""
    return state.settings.threads * (len(_up(state)) // max(1, busy))


def speedup(threads: int, own: int, seconds: float, fixed: float) -> float:
    """How much faster a step is on `threads` than on its device's own.

    seconds: what it takes on those; fixed: what an empty one would.
    """
    if not own or not threads:
        return 1.0
    times = threads / own
    return float(seconds / (fixed / times**FIXED_GAIN + max(0.0, seconds - fixed) / times**TOKEN_GAIN))


def _up(state: NodeState) -> list[Device]:
    return [device for device in state.devices.values() if device.arena is not None]


def _is_busy(device: Device) -> bool:
    """Whether a device computes, or copies a model."""
    return bool(device.inflight) or any(r.stage is Stage.COPYING for r in device.replicas.values())

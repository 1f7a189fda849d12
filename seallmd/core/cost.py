"""How long things take: a roofline to begin with, and a line fitted to what was measured.

Owns the prediction of step times, and its error. Must not know requests or policy. The simulator times its
devices with the same rooflines; the daemon learns from every `StepDone` (DESIGN section 4).

A step is described by two numbers: tokens (all rows together) and context (tokens of KV that all rows read
together). Seconds are taken to be linear in them: fixed cost (weights read once, launches), per token (matrix
products), per token of context (KV read).
"""

from __future__ import annotations

import msgspec

from seallmd.core.messages import ModelShape


class Roofline(msgspec.Struct, frozen=True):
    """What a device can do. flops: matrix products per second; bytes_per_second: memory read.

    copy_bytes_per_second: host to device. step_seconds: fixed cost of one step (launches, host work).
    efficiency: share of the two limits that a real engine reaches.
    """

    name: str
    flops: float
    bytes_per_second: float
    copy_bytes_per_second: float
    step_seconds: float
    memory_bytes: int
    efficiency: float = 0.6

    def step(self, shape: ModelShape, tokens: int, context: int) -> float:
        """Seconds of one step: the weights and the KV are read once, every token costs two flops a weight."""
        weights = shape.weights_bytes
        flops = 2 * tokens * weights / shape.itemsize
        read = weights + context * shape.kv_bytes_per_token
        return self.step_seconds + max(flops / self.flops, read / self.bytes_per_second) / self.efficiency

    def copy(self, bytes_: int) -> float:
        """Seconds to bring bytes from the host."""
        return bytes_ / self.copy_bytes_per_second


# Published figures; cpu is this class of machine, measured (docs/benchmarks.md).
ROOFLINES = {
    roofline.name: roofline
    for roofline in (
        Roofline("a100-80g", 312e12, 2.0e12, 24e9, 2e-3, 80 << 30),
        Roofline("h100", 990e12, 3.35e12, 50e9, 2e-3, 80 << 30),
        Roofline("h200", 990e12, 4.8e12, 50e9, 2e-3, 141 << 30),
        Roofline("cpu", 60e9, 23e9, 8e9, 4e-3, 2 << 30),
    )
}

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


_TOKENS, _CONTEXT = 100.0, 1000.0  # scales of the features, so that the coefficients are of one size
_NOISE = 0.1  # of one step, as a share
_UNSURE = 10.0  # a first guess may be off by so many times itself
_DRIFT = 0.003  # of a coefficient between two steps, as a share: about 30 steps are remembered
_ERROR_WEIGHT = 0.02


class StepCosts(msgspec.Struct):
    """Seconds of a service's steps: fixed + per token + per token of context, learnt from each step.

    A Kalman filter whose state, the coefficients, drifts slowly (Haykin, Adaptive Filter Theory, ch. 14), on
    relative errors, so that short steps count as much as long ones. coefficients: seconds for [one step, 100
    tokens, 1000 tokens of context]. covariance: how unsure they still are, 3 x 3. error: mean of |predicted -
    measured| / measured, lately.
    """

    coefficients: list[float]
    covariance: list[list[float]]
    steps: int = 0
    error: float = 0.0

    @classmethod
    def guess(cls, roofline: Roofline, shape: ModelShape) -> StepCosts:
        """What the device's roofline says, and very unsure of it."""
        fixed = roofline.step(shape, 0, 0)
        tokens = roofline.step(shape, 1 << 20, 0) / (1 << 20) * _TOKENS
        context = (roofline.step(shape, 0, 1 << 20) - fixed) / (1 << 20) * _CONTEXT
        start = [fixed, tokens, context]
        unsure = [[0.0] * 3 for _ in range(3)]
        for i, value in enumerate(start):
            unsure[i][i] = (_UNSURE * max(value, fixed) / _NOISE) ** 2
        return cls(start, unsure)

    def predict(self, tokens: float, context: float) -> float:
        """Seconds of a step with so many tokens in all rows, which read so many tokens of KV."""
        fixed, per_token, per_context = self.coefficients
        seconds = fixed + per_token * tokens / _TOKENS + per_context * context / _CONTEXT
        return max(seconds, 1e-6)

    def learn(self, tokens: int, context: int, seconds: float) -> None:
        """A step took so long."""
        seconds = max(seconds, 1e-6)
        wrong = 1 - self.predict(tokens, context) / seconds
        weight = max(_ERROR_WEIGHT, 1 / (self.steps + 1))
        self.error += weight * (abs(wrong) - self.error)
        self.steps += 1
        x = (1 / seconds, tokens / _TOKENS / seconds, context / _CONTEXT / seconds)
        px = [sum(row[j] * x[j] for j in range(3)) for row in self.covariance]
        denominator = 1 + sum(x[i] * px[i] for i in range(3))
        gain = [value / denominator for value in px]
        # A coefficient below zero would make larger batches look free.
        self.coefficients = [max(0.0, c + g * wrong) for c, g in zip(self.coefficients, gain, strict=True)]
        self.covariance = [[self.covariance[i][j] - gain[i] * px[j] for j in range(3)] for i in range(3)]
        # Drift adds doubt at a steady rate. Forgetting by a factor would let it explode in the directions of
        # which steps that are all alike teach nothing.
        for i, value in enumerate(self.coefficients):
            self.covariance[i][i] += (_DRIFT * max(value, self.coefficients[0]) / _NOISE) ** 2

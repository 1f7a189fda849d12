"""How long things take: a roofline to begin with, and a line fitted to what was measured.

Owns the prediction of step times, and its error. Must not know requests or policy. The simulator times its
devices with the same rooflines; the daemon learns from every `StepDone` (DESIGN section 4).

A step is described by three numbers: tokens (all rows together), context (tokens of KV that all rows read
together) and rows (those that draw a token). Seconds are taken to be linear in them: fixed cost (weights read
once, launches), per token (matrix products of the layers), per token of context (KV read), per row (the
output layer, which runs for the last token of a prompt alone, and sampling). In models with large
vocabularies the output layer is most of a decode step and nothing of a prompt: tokens alone cannot tell both.
"""

from __future__ import annotations

from operator import mul

import msgspec

from seallmd.core.messages import ModelShape


class Work(msgspec.Struct, frozen=True):
    """What the steps of a model ask of a device.

    layers_bytes: weights that each step reads; output_bytes: those of the output layer. token_flops: products
    of one token in all layers; row_flops: of one row in the output layer. context_bytes: KV of one token.
    reductions: sums over all ranks in a step of a tensor-parallel group; the rest is then of one rank.
    """

    layers_bytes: int
    output_bytes: int
    token_flops: float
    row_flops: float
    context_bytes: int
    reductions: int = 0

    @classmethod
    def of(cls, shape: ModelShape, ranks: int = 1) -> Work:
        """Of a probed model, whose embedding and output layer are segments of whole rows of the vocabulary.

        An embedding is looked up, which costs nothing; tied to the output layer it is one segment with it.
        A model without such a segment is taken to have an output layer that costs nothing.
        """
        row_bytes = max(1, shape.vocab) * shape.itemsize
        vocabulary = [size for size in shape.segments if size % row_bytes == 0]
        layers, output = shape.weights_bytes - sum(vocabulary), (vocabulary or [0])[-1]
        flops = 2 / shape.itemsize  # of one byte of weights and one token: multiply and add
        return cls(
            layers // ranks,
            output // ranks,
            flops * layers / ranks,
            flops * output / ranks,
            shape.kv_bytes_per_token // ranks,
            reductions=2 * len(shape.layers) if ranks > 1 else 0,
        )


class Roofline(msgspec.Struct, frozen=True):
    """What a device can do. flops: matrix products per second; bytes_per_second: memory read.

    copy_bytes_per_second: host to device. step_seconds: fixed cost of one step (launches, host work).
    efficiency: share of the two limits that a real engine reaches. serial: share of the shorter of reading
    and computing that is not hidden behind the longer; 1 where one core does both in turn. context_share: KV
    is read at this share of bytes_per_second (it is scattered, and attention is more than reading).
    reduce_seconds: of one sum over the ranks of a tensor-parallel group.
    """

    name: str
    flops: float
    bytes_per_second: float
    copy_bytes_per_second: float
    step_seconds: float
    memory_bytes: int
    efficiency: float = 0.6
    serial: float = 0.0
    context_share: float = 1.0
    reduce_seconds: float = 20e-6

    def step(self, work: Work, tokens: int, context: int, rows: int) -> float:
        """Seconds of one step: weights and KV are read once, every token is multiplied with every layer."""
        weights = work.layers_bytes + (work.output_bytes if rows else 0)
        reading = (weights + context * work.context_bytes / self.context_share) / self.bytes_per_second
        computing = (tokens * work.token_flops + rows * work.row_flops) / self.flops
        longer, shorter = max(reading, computing), min(reading, computing)
        fixed = self.step_seconds + work.reductions * self.reduce_seconds
        return fixed + (longer + self.serial * shorter) / self.efficiency

    def copy(self, bytes_: int) -> float:
        """Seconds to bring bytes from the host."""
        return bytes_ / self.copy_bytes_per_second


# Published figures; cpu: one thread of this class of machine, fitted to measured steps (docs/benchmarks.md).
ROOFLINES = {
    roofline.name: roofline
    for roofline in (
        Roofline("a100-80g", 312e12, 2.0e12, 24e9, 2e-3, 80 << 30),
        Roofline("h100", 990e12, 3.35e12, 50e9, 2e-3, 80 << 30),
        Roofline("h200", 990e12, 4.8e12, 50e9, 2e-3, 141 << 30),
        Roofline(
            *("cpu", 90e9, 36e9, 8e9, 1.7e-3, 2 << 30),
            efficiency=1.0,
            serial=1.0,
            context_share=0.19,
            reduce_seconds=0.6e-3,
        ),
    )
}


_TOKENS, _CONTEXT, _ROWS = 100.0, 1000.0, 10.0  # scales of the features: coefficients are of one size
_FEATURES = range(4)
_NOISE = 0.1  # of one step, as a share
_UNSURE = 10.0  # a first guess may be off by so many times itself
_DRIFT = 0.003  # of a coefficient between two steps, as a share: about 30 steps are remembered
_ERROR_WEIGHT = 0.02
_MANY = 1 << 20  # tokens whose cost is nothing but theirs


class StepCosts(msgspec.Struct):
    """Seconds of a service's steps: fixed, per token, per token of context and per row, learnt from each.

    A Kalman filter whose state, the coefficients, drifts slowly (Haykin, Adaptive Filter Theory, ch. 14), on
    relative errors, so that short steps count as much as long ones. coefficients: seconds for (one step, 100
    tokens, 1000 tokens of context, 10 rows). covariance: how unsure they still are, 4 x 4. error: mean of
    |predicted - measured| / measured, lately.
    """

    coefficients: tuple[float, float, float, float]
    covariance: list[list[float]]
    steps: int = 0
    error: float = 0.0

    @classmethod
    def guess(cls, roofline: Roofline, shape: ModelShape, ranks: int = 1) -> StepCosts:
        """What the device's roofline says of so many ranks, and very unsure of it."""
        work = Work.of(shape, ranks)
        fixed = roofline.step(work, 0, 0, 0)
        start = (
            roofline.step(work, 0, 0, 1),
            (roofline.step(work, _MANY, 0, 0) - fixed) / _MANY * _TOKENS,
            (roofline.step(work, 0, _MANY, 0) - fixed) / _MANY * _CONTEXT,
            (roofline.step(work, 0, 0, _MANY) - fixed) / _MANY * _ROWS,
        )
        unsure = [[0.0] * 4 for _ in _FEATURES]
        for i, value in enumerate(start):
            unsure[i][i] = (_UNSURE * max(value, start[0]) / _NOISE) ** 2
        return cls(start, unsure)

    def predict(self, tokens: float, context: float, rows: float | None = None) -> float:
        """Seconds of a step with so many tokens in all rows, which read so many tokens of KV.

        rows: those that draw a token; None: each token is such a row, as in a step that only decodes.
        """
        fixed, per_token, per_context, per_row = self.coefficients
        drawn = tokens if rows is None else rows
        seconds = fixed + per_token * tokens / _TOKENS + per_context * context / _CONTEXT
        return max(seconds + per_row * drawn / _ROWS, 1e-6)

    def learn(self, tokens: int, context: int, rows: int, seconds: float) -> None:
        """A step took so long."""
        seconds = max(seconds, 1e-6)
        wrong = 1 - self.predict(tokens, context, rows) / seconds
        weight = max(_ERROR_WEIGHT, 1 / (self.steps + 1))
        self.error += weight * (abs(wrong) - self.error)
        self.steps += 1
        x = (1 / seconds, tokens / _TOKENS / seconds, context / _CONTEXT / seconds, rows / _ROWS / seconds)
        px = [sum(map(mul, row, x)) for row in self.covariance]
        denominator = 1 + sum(map(mul, px, x))
        gain = wrong / denominator
        a, b, c, d = (old + gain * p for old, p in zip(self.coefficients, px, strict=True))
        # A coefficient below zero would make larger batches look free.
        self.coefficients = (max(0.0, a), max(0.0, b), max(0.0, c), max(0.0, d))
        self.covariance = [
            [entry - p * q / denominator for entry, q in zip(row, px, strict=True)]
            for row, p in zip(self.covariance, px, strict=True)
        ]
        # Drift adds doubt at a steady rate. Forgetting by a factor would let it explode in the directions of
        # which steps that are all alike teach nothing.
        for i, value in enumerate(self.coefficients):
            self.covariance[i][i] += (_DRIFT * max(value, self.coefficients[0]) / _NOISE) ** 2

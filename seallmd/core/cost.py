"""How long things take: a roofline to begin with, and a line fitted to what was measured.

Owns the prediction of step times, and its error. Must not know requests or policy. The simulator times its
devices with the same rooflines; the daemon learns from every `StepDone` (docs/design.md).

A step is described by three numbers: tokens (all rows together), context (tokens of KV that all rows read
together) and rows (those that draw a token). Seconds are taken to be linear in them: fixed cost (weights read
once, launches), per row (its last token in the layers and the output layer, sampling), per other token, those
of prompts (the layers alone), per token of context (KV read). Rows and prompts differ: the output layer of a
large vocabulary is most of a decode step and nothing of a prompt, and on GPUs a decode step has its products
for free while it reads the weights.
"""

from __future__ import annotations

import msgspec

from seallmd.core.shapes import ModelShape


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
        row_bytes = max(1, shape.vocab) * shape.bytes_per_weight
        vocabulary = [size for size in shape.segments if size and size % row_bytes == 0]
        layers, output = shape.weights_bytes - sum(vocabulary), (vocabulary or [0])[-1]
        flops = 2 / shape.bytes_per_weight  # of one byte of weights and one token: multiply and add
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
    reduce_seconds: of one sum over the ranks of a tensor-parallel group. contention: by how much a step is
    slower, as a share, for each other device of the machine that runs one at the same time. reads_host:
    weights serve out of host memory until they have been copied.
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
    contention: float = 0.0
    reads_host: bool = False

    def step(self, work: Work, tokens: int, context: int, rows: int) -> float:
        """Seconds of one step: weights and KV are read once, every token is multiplied with every layer."""
        weights = work.layers_bytes + (work.output_bytes if rows else 0)
        reading = (weights + context * work.context_bytes / self.context_share) / self.bytes_per_second
        computing = (tokens * work.token_flops + rows * work.row_flops) / self.flops
        longer, shorter = (reading, computing) if reading > computing else (computing, reading)
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
            *("cpu", 90e9, 36e9, 14e9, 1.7e-3, 2 << 30),
            efficiency=1.0,
            serial=1.0,
            context_share=0.19,
            reduce_seconds=0.6e-3,
            contention=0.09,
            reads_host=True,
        ),
    )
}


_ROWS, _CONTEXT, _PROMPT = 100.0, 1000.0, 100.0  # scales of the features: coefficients are of one size
_NOISE = 0.1  # of one step, as a share
_UNSURE = 50.0  # a first guess may be off by so many times itself
_DRIFT = 0.003 / _NOISE  # of a coefficient from one step to the next: about 30 steps are remembered
_ERROR_STEPS = 50  # that the mean error goes back over
_ERROR_WEIGHT = 1 / _ERROR_STEPS
_MANY = 1 << 20  # tokens whose cost is nothing but theirs
_BATCH = 8  # rows of a decode step
_LEAST_SECONDS = 1e-6  # of a step


class StepCosts(msgspec.Struct):
    """Seconds of a service's steps: fixed, per row, per token of context, per prompt token.

    Kalman filters whose states, the coefficients, drift slowly (Haykin, Adaptive Filter Theory, ch. 14),
    on relative errors of each step, so that short steps count as much as long ones. Steps that only
    decode teach the first three, steps with prompts the last one: what prompts cost is not quite linear
    (on GPUs a short one is free while the weights are read), and one filter for all four shifted that
    error to where steps that are all alike cannot tell coefficients apart. decode: seconds for (one step,
    100 rows, 1000 tokens of context). covariance: how unsure they still are, 3 x 3. prompt: seconds for
    100 tokens; variance: of that. error: mean of |predicted - measured| / measured, lately.
    """

    decode: tuple[float, float, float]
    covariance: list[list[float]]
    prompt: float
    variance: float
    steps: int = 0
    error: float = 0.0

    @classmethod
    def guess(cls, roofline: Roofline, shape: ModelShape, ranks: int = 1) -> StepCosts:
        """What the device's roofline says of so many ranks, and very unsure of it."""
        work = Work.of(shape, ranks)
        nothing, one = roofline.step(work, 0, 0, 0), roofline.step(work, 1, 0, 1)
        per_row = (roofline.step(work, _BATCH, 0, _BATCH) - one) / (_BATCH - 1)
        fixed = one - per_row
        per_context = (roofline.step(work, 0, _MANY, 0) - nothing) / _MANY
        per_prompt = (roofline.step(work, _MANY, 0, 0) - nothing) / _MANY
        return cls.known(fixed, per_row, per_context, per_prompt, unsure=_UNSURE)

    @classmethod
    def known(
        cls, fixed: float, per_row: float, per_context: float, per_prompt: float, unsure: float = 0.1
    ) -> StepCosts:
        """These costs, in seconds. unsure: how many times itself each may be off, or the fixed one."""
        decode, prompt = (fixed, per_row * _ROWS, per_context * _CONTEXT), per_prompt * _PROMPT
        doubts = [(unsure * max(value, fixed) / _NOISE) ** 2 for value in (*decode, prompt)]
        covariance = [[doubts[i] if i == j else 0.0 for j in range(3)] for i in range(3)]
        return cls(decode, covariance, prompt, doubts[3])

    def predict(self, tokens: float, context: float, rows: float | None = None) -> float:
        """Seconds of a step with so many tokens in all rows, which read so many tokens of KV.

        rows: those that draw a token; None: each token is such a row, as in a step that only decodes.
        """
        fixed, per_row, per_context = self.decode
        if rows is None:
            rows = tokens
        seconds = fixed + per_row * rows / _ROWS + per_context * context / _CONTEXT
        seconds += self.prompt * (tokens - rows) / _PROMPT
        if seconds < _LEAST_SECONDS:  # asked all the time: a call of max() takes as long as all of this
            return _LEAST_SECONDS
        return seconds

    def learn(self, tokens: int, context: int, rows: int, seconds: float) -> None:
        """A step took so long."""
        if seconds < _LEAST_SECONDS:
            seconds = _LEAST_SECONDS
        wrong = 1 - self.predict(tokens, context, rows) / seconds
        self.steps += 1
        weight = 1 / self.steps if self.steps < _ERROR_STEPS else _ERROR_WEIGHT
        self.error += weight * (abs(wrong) - self.error)
        if tokens > rows:
            self._learn_prompt((tokens - rows) / _PROMPT / seconds, wrong)
        else:
            self._learn_decode((1 / seconds, rows / _ROWS / seconds, context / _CONTEXT / seconds), wrong)

    def _learn_decode(self, x: tuple[float, float, float], wrong: float) -> None:
        # Written out: this runs after every step, and loops over three would cost three times as much.
        x0, x1, x2 = x
        (c00, c01, c02), (_, c11, c12), (_, _, c22) = self.covariance  # symmetric
        p0 = c00 * x0 + c01 * x1 + c02 * x2
        p1 = c01 * x0 + c11 * x1 + c12 * x2
        p2 = c02 * x0 + c12 * x1 + c22 * x2
        denominator = 1 + p0 * x0 + p1 * x1 + p2 * x2
        gain = wrong / denominator
        fixed, per_row, per_context = self.decode
        fixed, per_row, per_context = fixed + gain * p0, per_row + gain * p1, per_context + gain * p2
        q0, q1, q2 = p0 / denominator, p1 / denominator, p2 / denominator
        c00, c11, c22 = c00 - p0 * q0, c11 - p1 * q1, c22 - p2 * q2
        c01, c02, c12 = c01 - p0 * q1, c02 - p0 * q2, c12 - p1 * q2
        if fixed < 0 or per_row < 0 or per_context < 0:  # would make larger batches look free
            covariance = [[c00, c01, c02], [c01, c11, c12], [c02, c12, c22]]
            fixed, per_row, per_context = _not_negative([fixed, per_row, per_context], covariance)
        self.decode = (fixed, per_row, per_context)
        # Drift adds doubt at a steady rate. Forgetting by a factor would let it explode in the directions of
        # which steps that are all alike teach nothing.
        drift = _drift(fixed)
        self.covariance = [
            [c00 + drift, c01, c02],
            [c01, c11 + (drift if per_row <= fixed else _drift(per_row)), c12],
            [c02, c12, c22 + (drift if per_context <= fixed else _drift(per_context))],
        ]

    def _learn_prompt(self, x: float, wrong: float) -> None:
        gain = self.variance * x / (1 + self.variance * x * x)
        self.prompt = max(0.0, self.prompt + gain * wrong)
        self.variance += _drift(max(self.prompt, self.decode[0])) - gain * x * self.variance


def _not_negative(state: list[float], covariance: list[list[float]]) -> tuple[float, float, float]:
    """The likeliest state with no coefficient below 0 (Simon, Kalman filtering with state constraints, 2010).

    What one coefficient is raised by, the others answer for as the covariance says, so that predictions for
    steps like those seen stay right. Raising it alone made them wrong, and the next step's correction, along
    the same direction, more so.
    """
    for _ in state:
        low = min(range(3), key=lambda i: state[i])
        if state[low] >= 0 or covariance[low][low] <= 0:
            break
        share = [covariance[i][low] / covariance[low][low] for i in range(3)]
        state = [value - state[low] * share[i] for i, value in enumerate(state)]
        state[low] = 0.0
        covariance = [[covariance[i][j] - share[i] * covariance[low][j] for j in range(3)] for i in range(3)]
    return max(0.0, state[0]), max(0.0, state[1]), max(0.0, state[2])


def _drift(coefficient: float) -> float:
    """Variance that a coefficient gains from one step to the next."""
    drift = _DRIFT * coefficient
    return drift * drift

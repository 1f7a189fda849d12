"""What is known of a service's work: how long its steps take, how long its answers are, how many come.

Owns the profile and the execution time that it predicts for a request (SeaLLM's input to scheduling). Must
not know policies. Profiles are learnt online and outlive the daemon (`Node.profiles`).
"""

from __future__ import annotations

import math

import msgspec

from seallmd.core.cost import StepCosts

_FIRST_OUTPUT_TOKENS = 128.0
_FIRST_PROMPT_TOKENS = 256.0
_LENGTH_WEIGHT = 0.02  # an answer's weight in the mean lengths, once there have been 50


class Lengths(msgspec.Struct):
    """How lengths in tokens are distributed, lately.

    bins: weights; bin i has the lengths from 2 ** (i / 2) up to 2 ** ((i + 1) / 2).
    """

    bins: list[float] = []

    def add(self, tokens: int) -> None:
        """One more; the others weigh a little less from now on."""
        at = int(2 * math.log2(max(1, tokens)))
        self.bins = [(1 - _LENGTH_WEIGHT) * weight for weight in self.bins]
        self.bins += [0.0] * (at + 1 - len(self.bins))
        self.bins[at] += 1

    def quantile(self, share: float) -> float:
        """A length that so large a share of them stays below, to within half a bin; 0 when there are none."""
        left = share * sum(self.bins)
        for at, weight in enumerate(self.bins):
            left -= weight
            if left <= 0 < weight:
                return 2 ** ((at + 0.5) / 2)
        return 0.0


class ServiceProfile(msgspec.Struct):
    """costs: of its steps. prompt_tokens, output_tokens: mean lengths of requests that ended by themselves.

    rows: mean rows of its decode steps, the batch size that a token's time is counted for. prompts, outputs:
    how the lengths are distributed. requests_per_second: that arrived when the profile was kept.
    """

    costs: StepCosts
    prompt_tokens: float = _FIRST_PROMPT_TOKENS
    output_tokens: float = _FIRST_OUTPUT_TOKENS
    rows: float = 1.0
    requests: int = 0
    prompts: Lengths = msgspec.field(default_factory=Lengths)
    outputs: Lengths = msgspec.field(default_factory=Lengths)
    requests_per_second: float = 0.0

    def ended(self, prompt: int, output: int) -> None:
        """A request had these lengths."""
        self.requests += 1
        self.prompts.add(prompt)
        self.outputs.add(output)
        weight = max(_LENGTH_WEIGHT, 1 / (self.requests + 1))
        self.prompt_tokens += weight * (prompt - self.prompt_tokens)
        self.output_tokens += weight * (output - self.output_tokens)

    def stepped(self, tokens: int, rows: int, context: int, seconds: float) -> None:
        """A step had so many rows that drew a token, and took so long."""
        self.costs.learn(tokens, context, rows, seconds)
        if tokens == rows:
            self.rows += 0.05 * (rows - self.rows)

    def token_seconds(self) -> float:
        """Execution time of one generated token in the service's typical batch: what a token is charged."""
        context = self.prompt_tokens + self.output_tokens / 2
        return self.costs.predict(self.rows, self.rows * context)

    def prefill_seconds(self, tokens: int) -> float:
        """Execution time of a prompt, alone."""
        return self.costs.predict(tokens, tokens, 1)

    def request_seconds(self, prompt: int, *, draws: bool = True) -> float:
        """Execution time that a request is expected to need, from its prompt and the service's mean output.

        SeaLLM's estimate, and a request's first budget (reconstructed: the paper gives the inputs only).
        draws: whether it has an output at all.
        """
        output = self.output_tokens * self.token_seconds() if draws else 0.0
        return self.prefill_seconds(prompt) + output

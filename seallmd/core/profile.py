"""What is known of a service's work: how long its steps take, how long its answers are, how many come.

Owns the profile and the execution time that it predicts for a request (SeaLLM's input to scheduling). Must
not know policies. Profiles are learnt online and outlive the daemon: `record` and the constructor turn them
into plain data and back.
"""

from __future__ import annotations

import msgspec

from seallmd.core.cost import StepCosts

_FIRST_OUTPUT_TOKENS = 128.0
_FIRST_PROMPT_TOKENS = 256.0
_LENGTH_WEIGHT = 0.02  # an answer's weight in the mean lengths, once there have been 50


class ServiceProfile(msgspec.Struct):
    """costs: of its steps. prompt_tokens, output_tokens: mean lengths of requests that ended by themselves.

    rows: mean rows of its decode steps, the batch size that a token's time is counted for.
    """

    costs: StepCosts
    prompt_tokens: float = _FIRST_PROMPT_TOKENS
    output_tokens: float = _FIRST_OUTPUT_TOKENS
    rows: float = 1.0
    requests: int = 0

    def ended(self, prompt: int, output: int) -> None:
        """A request had these lengths."""
        self.requests += 1
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

    def request_seconds(self, prompt: int) -> float:
        """Execution time that a request is expected to need, from its prompt and the service's mean output.

        SeaLLM's estimate, and a request's first budget (reconstructed: the paper gives the inputs only).
        """
        return self.prefill_seconds(prompt) + self.output_tokens * self.token_seconds()

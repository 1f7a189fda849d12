"""Log-probabilities of tokens, for those requests that want them.

Owns turning logits into `messages.Scores`, and the way from a forward pass to the logits of prompt tokens:
they are computed for a few rows at a time, because those of a long prompt over a large vocabulary are larger
than the model. Must not know requests or the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from seallmd.core.messages import Scores
from seallmd.worker.sampler import Draw
from seallmd.worker.transfer import to_device

# Of logits in float32 at a time; the scores are made with as much again.
_CHUNK_BYTES = 32 << 20


class PromptPart(NamedTuple):
    """Neighbouring prompt tokens of one request. position: of the first among the request's tokens.

    at: packed index of the row that predicts the first; the others follow. top: likeliest ids to tell.
    """

    request: int
    position: int
    tokens: list[int]
    at: int
    top: int


def score_drawn(
    logits: torch.Tensor, drawn: torch.Tensor, draws: Sequence[Draw], requests: Sequence[int]
) -> list[Scores]:
    """Scores of drawn tokens, for rows that want them. logits: [rows, vocabulary], as the model gave them."""
    wanted = [row for row, draw in enumerate(draws) if draw.sampling.logprobs >= 0]
    if not wanted:
        return []
    rows = to_device(wanted, logits.device)
    tops = [draws[row].sampling.logprobs for row in wanted]
    table = _Table(logits[rows], drawn[rows], max(tops))
    places = [(requests[row], len(draws[row].tokens)) for row in wanted]
    return [table.part(i, i + 1, *place, tops[i]) for i, place in enumerate(places)]


def score_prompts(head: Head, parts: Sequence[PromptPart]) -> list[Scores]:
    """Scores of prompt tokens. Every rank of a tensor-parallel group has to call it with the same parts."""
    scores = []
    for part in parts:
        rows = head.rows_within(_CHUNK_BYTES)
        for begin in range(0, len(part.tokens), rows):
            tokens = part.tokens[begin : begin + rows]
            at = part.at + begin
            logits = head.logits(range(at, at + len(tokens)))
            table = _Table(logits, to_device(tokens, logits.device), part.top)
            scores.append(table.part(0, len(tokens), part.request, part.position + begin, part.top))
    return scores


class _Table:
    """Scores of some rows, on the host."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, top: int) -> None:
        """logits: [rows, vocabulary]. tokens: int64 [rows]."""
        values = logits.float()
        own = values.gather(1, tokens[:, None])
        likeliest = torch.topk(values, min(top, values.shape[1]), dim=-1)
        total = values.logsumexp(-1, keepdim=True)
        self._ids = torch.cat([tokens[:, None], likeliest.indices], 1).int().cpu().numpy()
        self._logprobs = (torch.cat([own, likeliest.values], 1) - total).cpu().numpy()
        self._ranks = ((values > own).sum(-1) + 1).int().cpu().numpy()

    def part(self, begin: int, end: int, request: int, position: int, top: int) -> Scores:
        """Rows [begin, end), cut to `top` likeliest."""
        width = min(1 + top, self._ids.shape[1])
        return Scores(
            request,
            position,
            width - 1,
            self._ids[begin:end, :width].astype("<i4").tobytes(),
            self._logprobs[begin:end, :width].astype("<f4").tobytes(),
            self._ranks[begin:end].astype("<i4").tobytes(),
        )


class Head:
    """What the decoder put out in a forward pass that is over, and logits of any of its rows.

    These are by the model's own code behind the decoder: what stands there (output layer, soft cap, scale)
    differs from family to family. So the model is called again with the decoder's output of before in place
    of the decoder.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor) -> None:
        self._model, self._decoder, self._input_ids = model, model.base_model, input_ids
        self._output: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the decoder puts out in the forward pass inside."""

        def keep(_module: object, _arguments: object, output: Any) -> None:
            self._output = output

        handle = self._decoder.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @property
    def hidden(self) -> torch.Tensor:
        """[packed tokens, hidden size] behind the final norm."""
        found: torch.Tensor = self._output.last_hidden_state[0]
        return found

    def rows_within(self, bytes_: int) -> int:
        """Rows whose logits in float32 take no more than so many bytes; at least one."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        return max(1, bytes_ // (4 * vocabulary))

    def logits(self, rows: range) -> torch.Tensor:
        """[rows, vocabulary] of these packed rows."""
        chosen = torch.arange(rows.start, rows.stop, device=self._input_ids.device)
        with _answering(self._decoder, lambda *_, **__: self._output):
            found: torch.Tensor = self._model(
                input_ids=self._input_ids, use_cache=False, logits_to_keep=chosen
            ).logits[0]
        return found if found.shape[0] == len(rows) else found[chosen]  # some families compute all


@contextmanager
def _answering(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module answer with something else."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own

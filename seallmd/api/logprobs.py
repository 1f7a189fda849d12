"""Log-probabilities as clients get them.

Owns the objects of OpenAI's two endpoints and vLLM's `prompt_logprobs`, and unpacking the engine's scores.
Must not know requests, HTTP or where scores come from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

import msgspec

from seallmd.api.vocabulary import Vocabulary
from seallmd.core.messages import Scores

_LEAST = -9999.0  # JSON has no infinity; vLLM writes the same


class TokenScore(msgspec.Struct, frozen=True):
    """One token's score. likeliest: (id, log-probability), the likeliest first."""

    token: int
    logprob: float
    rank: int
    likeliest: list[tuple[int, float]]


def unpack(packed: Iterable[Scores]) -> Iterable[TokenScore]:
    """The scores of tokens in order."""
    for scores in packed:
        width, tokens = 1 + scores.top, scores.tokens
        ids = struct.unpack(f"<{tokens * width}i", scores.ids)
        values = [max(v, _LEAST) for v in struct.unpack(f"<{tokens * width}f", scores.logprobs)]
        ranks = struct.unpack(f"<{tokens}i", scores.ranks)
        for index, rank in enumerate(ranks):
            own, end = index * width, (index + 1) * width
            others = list(zip(ids[own + 1 : end], values[own + 1 : end], strict=True))
            yield TokenScore(ids[own], values[own], rank, others)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Of /v1/completions: parallel arrays over tokens. text_offset: where each begins in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens. bytes: of the token in UTF-8."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatTokenLogprob(TopLogprob, frozen=True):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of /v1/chat/completions."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's: of one id in the place of a prompt token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class LogprobWriter:
    """Words scores for one request."""

    def __init__(self, vocabulary: Vocabulary, *, top: int, prompt_top: int, as_ids: bool) -> None:
        """top: alternatives to tell of each token, prompt_top: in `prompt_logprobs`.

        as_ids: tokens are called "token_id:ID", which tells apart those of one text.
        """
        self._vocabulary, self._top, self._prompt_top = vocabulary, top, prompt_top
        self._name: Callable[[int], str] = (lambda token: f"token_id:{token}") if as_ids else vocabulary.text

    def completion(
        self, scores: Iterable[TokenScore | None], tokens: Sequence[int], offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """For neighbouring tokens. A score of None is that of a prompt's first."""
        answer = CompletionLogprobs([], [], [], [])
        for score, token, offset in zip(scores, tokens, offsets, strict=True):
            answer.tokens.append(self._name(token))
            answer.text_offset.append(offset)
            answer.token_logprobs.append(None if score is None else score.logprob)
            answer.top_logprobs.append(None if score is None else self._likeliest(score))
        return answer

    def chat(self, scores: Iterable[TokenScore]) -> ChatLogprobs:
        """For neighbouring tokens."""
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    self._name(score.token),
                    score.logprob,
                    self._vocabulary.bytes_(score.token),
                    [
                        TopLogprob(self._name(token), logprob, self._vocabulary.bytes_(token))
                        for token, logprob in score.likeliest[: self._top]
                    ],
                )
                for score in scores
            ]
        )

    def prompt(self, scores: Iterable[TokenScore]) -> PromptLogprobs:
        """For a prompt; scores begin with its second token."""
        return [None, *(self._by_id(score) for score in scores)]

    def _likeliest(self, score: TokenScore) -> dict[str, float]:
        """Of tokens with one text the likeliest counts; the token itself is there in any case."""
        found: dict[str, float] = {}
        for token, logprob in (*score.likeliest[: self._top], (score.token, score.logprob)):
            found.setdefault(self._name(token), logprob)
        return found

    def _by_id(self, score: TokenScore) -> dict[str, PromptLogprob]:
        text = self._vocabulary.text
        own = PromptLogprob(score.logprob, score.rank, text(score.token))
        others = {
            str(token): PromptLogprob(logprob, rank, text(token))
            for rank, (token, logprob) in enumerate(score.likeliest[: self._prompt_top], start=1)
        }
        return {str(score.token): own, **{i: other for i, other in others.items() if i != str(score.token)}}

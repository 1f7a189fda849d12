"""What clients of /v1/completions get.

Owns its fields, the echo of prompts, and how pieces of choices become chunks or a whole. Must not know
aiohttp, or where pieces come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from seallmd.api.choices import Choice, Piece
from seallmd.api.logprobs import CompletionLogprobs, LogprobWriter, PromptLogprobs, TokenScore, unpack
from seallmd.api.responses import Body, Head, Usage
from seallmd.api.schema import CompletionRequest
from seallmd.api.text import Echo
from seallmd.api.vocabulary import Vocabulary


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of /v1/completions, whole or as a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Body, frozen=True, kw_only=True):
    """The answer of /v1/completions; its chunks are of the same kind."""

    choices: list[CompletionChoice]


class CompletionAnswer:
    """`responses.Answer` of /v1/completions."""

    def __init__(
        self, request: CompletionRequest, vocabulary: Vocabulary, echoes: Sequence[Echo] = ()
    ) -> None:
        """echoes: of each prompt, if they are wanted."""
        self._head = Head.of(request, "cmpl")
        self._token_ids = bool(request.return_token_ids)
        self._per_prompt = request.choices
        self._echoes = echoes
        wanted = request.prompt_logprobs
        self._writer = LogprobWriter(
            vocabulary,
            top=max(0, request.output_top),
            prompt_top=wanted or 0,
            as_ids=bool(request.return_tokens_as_token_ids),
        )
        self._has_logprobs = request.output_top >= 0
        self._has_prompt_logprobs = wanted is not None
        self._begun: set[int] = set()

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[msgspec.Struct]:
        """One chunk, or none while there is nothing to say."""
        says = piece.text or piece.finish_reason or (piece.tokens and (self._token_ids or self._has_logprobs))
        if not says:
            return []
        return [self._body([self._choice(choice, piece)], usage)]

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """A chunk without choices."""
        return self._body([], usage)

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        """The whole response."""
        parts = zip(choices, pieces, strict=True)
        return self._body([self._choice(choice, piece) for choice, piece in parts], usage)

    def _choice(self, choice: Choice, piece: Piece) -> CompletionChoice:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        echo = self._echoes[piece.index // self._per_prompt] if self._echoes else None
        logprobs = None
        text = piece.text
        if self._has_logprobs:
            scores: list[TokenScore | None] = list(unpack(piece.scores))
            tokens, offsets = piece.tokens, piece.offsets
            if echo is not None:
                offsets = [len(echo.text) + offset for offset in offsets]
            if echo is not None and first:
                scores = [None, *unpack(choice.prompt_scores), *scores]
                tokens, offsets = [*choice.prompt, *tokens], [*echo.offsets, *offsets]
            logprobs = self._writer.completion(scores, tokens, offsets)
        if echo is not None and first:
            text = echo.text + text
        wants_prompt = first and self._has_prompt_logprobs
        return CompletionChoice(
            index=piece.index,
            text=text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,
            token_ids=piece.tokens if self._token_ids else UNSET,
            prompt_token_ids=choice.prompt if self._token_ids and first else UNSET,
            prompt_logprobs=self._writer.prompt(unpack(choice.prompt_scores)) if wants_prompt else UNSET,
        )

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            **msgspec.structs.asdict(self._head), object="text_completion", choices=choices, usage=usage
        )

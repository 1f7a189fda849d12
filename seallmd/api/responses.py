"""What all responses of OpenAI's API share: usage, the fields around the choices, and how pieces are joined.

Owns those and the interface behind which an endpoint words its own (`Answer`). Must not know aiohttp, or
where pieces come from. Fields that vLLM adds are left out unless asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from seallmd.api.choices import Choice, Piece
from seallmd.api.schema import GenerationRequest
from seallmd.api.tiers import tier_of


class PromptDetails(msgspec.Struct, frozen=True):
    """cached_tokens: prompt tokens whose KV was reused."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True):
    """reasoning_tokens: those of what was thought before the answers."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all its prompts and choices; a prompt counts once.

    completion_tokens_details: of models that think."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class Head(msgspec.Struct, frozen=True):
    """What each response and each chunk of one request repeats. service_tier: told to who asked for one."""

    id: str
    created: int
    model: str
    service_tier: str | UnsetType

    @classmethod
    def of(cls, request: GenerationRequest, prefix: str) -> Head:
        """For one request; its id is the client's own behind the prefix, if it gave one."""
        # The tier that serves: "auto" is not the answer to "auto".
        tier = UNSET if request.service_tier is None else tier_of(request.service_tier)
        return cls(
            f"{prefix}-{request.request_id or uuid.uuid4().hex}", int(time.time()), request.model, tier
        )


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `Head`, and usage, around the choices."""

    id: str
    object: str
    created: int
    model: str
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET


class Answer(Protocol):
    """How one endpoint words its responses."""

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> Sequence[object]:
        """The chunks for one piece of a stream, perhaps none."""

    def usage_chunk(self, usage: Usage) -> object | None:
        """The chunk that carries usage alone, after all others; None if there is no such chunk."""

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> object:
        """The response of a request that is not streamed; pieces[i] is all of choices[i]."""


def count_usage(choices: list[Choice], per_prompt: int) -> Usage:
    """Usage so far. per_prompt: choices of each prompt; they follow one another."""
    leaders = choices[::per_prompt]
    prompt = sum(len(choice.prompt) for choice in leaders)
    output = sum(choice.tokens for choice in choices)
    cached = sum(choice.stream.cached for choice in leaders)
    return Usage(prompt, output, prompt + output, PromptDetails(cached))


def join(pieces: list[Piece]) -> Piece:
    """The pieces of one choice, in order and to the end, as one."""
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        finish_reason=pieces[-1].finish_reason,
        offsets=[offset for piece in pieces for offset in piece.offsets],
        scores=[scores for piece in pieces for scores in piece.scores],
    )

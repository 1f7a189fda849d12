"""What clients get: OpenAI's response and chunk objects.

Owns their fields and how pieces of choices become them, for both endpoints behind one interface (`Answer`).
Must not know aiohttp, or where pieces come from. Fields that vLLM adds are left out unless asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from seallmd.api.choices import Choice, Piece


class PromptDetails(msgspec.Struct, frozen=True):
    """cached_tokens: prompt tokens whose KV was reused."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all its prompts and choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    usage: Usage | UnsetType | None = UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of /v1/completions, whole or as a chunk."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Completion(_Body, frozen=True, kw_only=True):
    """The answer of /v1/completions; its chunks are of the same kind."""

    choices: list[CompletionChoice]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of /v1/chat/completions."""

    index: int
    message: Message
    logprobs: None = None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(_Body, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions."""

    choices: list[ChatChoice]
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of the assistant's turn. role: in a choice's first chunk."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a chunk of /v1/chat/completions."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(_Body, frozen=True, kw_only=True):
    """A chunk of /v1/chat/completions."""

    choices: list[ChatChunkChoice]
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Answer(Protocol):
    """How one endpoint words its responses."""

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> Sequence[object]:
        """The chunks for one piece of a stream, perhaps none."""

    def usage_chunk(self, usage: Usage) -> object:
        """The chunk that carries usage alone, after all others."""

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> object:
        """The response of a request that is not streamed; pieces[i] is all of choices[i]."""


class CompletionAnswer:
    """`Answer` of /v1/completions."""

    def __init__(self, model: str, *, token_ids: bool) -> None:
        """token_ids: choices carry the ids of their tokens, and of their prompt once."""
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._token_ids = token_ids
        self._begun: set[int] = set()

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[msgspec.Struct]:
        """One chunk, or none while there is nothing to say."""
        if not _says_something(piece, self._token_ids):
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
        return CompletionChoice(
            index=piece.index,
            text=piece.text,
            finish_reason=piece.finish_reason,
            token_ids=piece.tokens if self._token_ids else UNSET,
            prompt_token_ids=choice.prompt if self._token_ids and first else UNSET,
        )

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )


class ChatAnswer:
    """`Answer` of /v1/chat/completions."""

    def __init__(self, model: str, *, token_ids: bool) -> None:
        """token_ids: choices carry the ids of their tokens; the prompt's are in the body, once."""
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._token_ids = token_ids
        self._begun: set[int] = set()

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[msgspec.Struct]:
        """The role first, alone; then a chunk for the piece, or none while there is nothing to say."""
        chunks: list[msgspec.Struct] = []
        if piece.index not in self._begun:
            prompt = choice.prompt if self._token_ids and not self._begun else UNSET
            self._begun.add(piece.index)
            delta = Delta(role="assistant", content="")
            chunks.append(self._chunk([ChatChunkChoice(index=piece.index, delta=delta)], usage, prompt))
        if _says_something(piece, self._token_ids):
            part = ChatChunkChoice(
                index=piece.index,
                delta=Delta(content=piece.text) if piece.text else Delta(),
                finish_reason=piece.finish_reason,
                token_ids=piece.tokens if self._token_ids else UNSET,
            )
            chunks.append(self._chunk([part], usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """A chunk without choices."""
        return self._chunk([], usage)

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> msgspec.Struct:
        """The whole response."""
        parts = [
            ChatChoice(
                index=piece.index,
                message=Message(content=piece.text),
                finish_reason=piece.finish_reason,
                token_ids=piece.tokens if self._token_ids else UNSET,
            )
            for piece in pieces
        ]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=parts,
            usage=usage,
            prompt_token_ids=choices[0].prompt if self._token_ids else UNSET,
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt: tuple[int, ...] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt,
        )


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
    )


def _says_something(piece: Piece, token_ids: bool) -> bool:
    return bool(piece.text or piece.finish_reason or (token_ids and piece.tokens))

"""What clients of /v1/chat/completions get.

Owns its fields, and how pieces of choices become chunks or a whole. Must not know aiohttp, or where pieces
come from.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from seallmd.api.choices import Choice, Piece
from seallmd.api.logprobs import ChatLogprobs, LogprobWriter, PromptLogprobs, unpack
from seallmd.api.responses import Body, CompletionDetails, Head, Usage
from seallmd.api.schema import ChatRequest
from seallmd.api.tool_reader import Argued, Called, Said
from seallmd.api.turns import Thought, TurnEvent, TurnFormat, Turns
from seallmd.api.vocabulary import Vocabulary


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What is called. arguments: JSON text, or the next piece of it."""

    name: str | UnsetType = UNSET
    arguments: str


class MadeCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of the assistant. index: in chunks alone; id and type: with its beginning."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's turn. reasoning_content: what it thought before."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    refusal: None = None
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of /v1/chat/completions."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class _ChatBody(Body, frozen=True, kw_only=True):
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatCompletion(_ChatBody, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions."""

    choices: list[ChatChoice]


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of the assistant's turn. role: in a choice's first chunk."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a chunk of /v1/chat/completions."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(_ChatBody, frozen=True, kw_only=True):
    """A chunk of /v1/chat/completions."""

    choices: list[ChatChunkChoice]


class ChatAnswer:
    """`responses.Answer` of /v1/chat/completions."""

    def __init__(self, request: ChatRequest, vocabulary: Vocabulary, turn: TurnFormat) -> None:
        self._turns = Turns(turn)
        self._head = Head.of(request, "chatcmpl")
        self._token_ids = bool(request.return_token_ids)
        self._has_logprobs = request.output_top >= 0
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._writer = LogprobWriter(
            vocabulary,
            top=max(0, request.output_top),
            prompt_top=request.prompt_logprobs or 0,
            as_ids=bool(request.return_tokens_as_token_ids),
        )
        self._begun: set[int] = set()

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[msgspec.Struct]:
        """The role first, alone; then a chunk for the piece, or none while there is nothing to say."""
        chunks: list[msgspec.Struct] = []
        if piece.index not in self._begun:
            first = not self._begun
            self._begun.add(piece.index)
            delta = Delta(role="assistant", content="")
            part = ChatChunkChoice(index=piece.index, delta=delta)
            chunks.append(self._chunk([part], usage, choice if first else None))
        deltas = [_delta(event) for event in self._turns.events(piece)]
        tells = piece.finish_reason or (piece.tokens and (self._token_ids or self._has_logprobs))
        if tells and not deltas:
            deltas = [Delta()]
        for at, delta in enumerate(deltas, start=1):
            last = at == len(deltas)  # it carries what is told once
            part = ChatChunkChoice(
                index=piece.index,
                delta=delta,
                logprobs=self._logprobs(piece) if last and piece.tokens else None,
                finish_reason=self._turns.reason(piece) if last else None,
                token_ids=piece.tokens if last and self._token_ids else UNSET,
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
                message=_message(self._turns.events(piece)),
                logprobs=self._logprobs(piece),
                finish_reason=self._turns.reason(piece),
                token_ids=piece.tokens if self._token_ids else UNSET,
            )
            for piece in pieces
        ]
        return ChatCompletion(
            **msgspec.structs.asdict(self._head),
            **self._of_prompt(choices[0]),
            object="chat.completion",
            choices=parts,
            usage=self._with_reasoning(usage),
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return self._writer.chat(unpack(piece.scores)) if self._has_logprobs else None

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """What is told of the prompt, once."""
        told: dict[str, Any] = {}
        if self._token_ids:
            told["prompt_token_ids"] = choice.prompt
        if self._has_prompt_logprobs:
            told["prompt_logprobs"] = self._writer.prompt(unpack(choice.prompt_scores))
        return told

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_of: Choice | None = None,
    ) -> ChatChunk:
        return ChatChunk(
            **msgspec.structs.asdict(self._head),
            **({} if prompt_of is None else self._of_prompt(prompt_of)),
            object="chat.completion.chunk",
            choices=choices,
            usage=self._with_reasoning(usage) if isinstance(usage, Usage) else usage,
        )

    def _with_reasoning(self, usage: Usage) -> Usage:
        tokens = self._turns.reasoning_tokens
        if tokens is None:
            return usage
        return msgspec.structs.replace(usage, completion_tokens_details=CompletionDetails(tokens))


def _delta(event: TurnEvent) -> Delta:
    match event:
        case Thought(text):
            return Delta(reasoning_content=text)
        case Said(text):
            return Delta(content=text)
        case Called(index, id_, name):
            function = CalledFunction(name=name, arguments="")
            return Delta(tool_calls=[MadeCall(index=index, id=id_, type="function", function=function)])
        case Argued(index, text):
            return Delta(tool_calls=[MadeCall(index=index, function=CalledFunction(arguments=text))])


def _message(events: list[TurnEvent]) -> Message:
    """The turn that the events of a whole text make up."""
    text = "".join(event.text for event in events if isinstance(event, Said))
    calls = []
    for event in events:
        if isinstance(event, Called):
            arguments = "".join(e.text for e in events if isinstance(e, Argued) and e.index == event.index)
            function = CalledFunction(name=event.name, arguments=arguments)
            calls.append(MadeCall(id=event.id, type="function", function=function))
    thought = "".join(event.text for event in events if isinstance(event, Thought))
    return Message(
        content=text or (None if calls or thought else ""),
        reasoning_content=thought or UNSET,
        tool_calls=calls or UNSET,
    )

"""What clients of /v1/responses send.

Owns the body's fields, and turning them into a chat request (`schema`): the rest of the way is the same. Must
not know aiohttp or the engine. Nothing is stored: a conversation comes whole with each request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seallmd.api.conversation import ChatMessage, FunctionCall, ToolCall
from seallmd.api.fields import ModelName, ServiceTier, Tokens, Unserved, decode_body, refuse_unserved
from seallmd.api.schema import ChatRequest
from seallmd.api.structured import JsonSchema, ResponseFormat
from seallmd.api.tools import Function, FunctionName, NamedFunction, NamedTool, Tool
from seallmd.errors import RequestError


class InputPart(msgspec.Struct, frozen=True):
    """A piece of a message; only text can be served."""

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, thoughts before one, a call that was made, or its result; which fields count depends on
    `type`."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[InputPart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: str | list[InputPart] = ""


class FunctionTool(Function, frozen=True):
    """A function that may be called."""

    type: Literal["function"] = "function"


class ChosenFunction(msgspec.Struct, frozen=True):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Meta(max_length=256)] = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`text`."""

    format: TextFormat | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses. A null is the same as leaving a field out."""

    model: ModelName
    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=1 << 16)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: Literal[0] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    service_tier: ServiceTier | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation. Raises RequestError."""
        first = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, ChatMessage(role="user", content=self.input)]
        return [*first, *_messages(self.input)]

    def as_chat(self) -> ChatRequest:
        """The same as a chat request. Raises RequestError."""
        choice = self.tool_choice
        if isinstance(choice, ChosenFunction):
            choice = NamedTool("function", NamedFunction(choice.name))  # type: ignore[assignment]
        return msgspec.structs.replace(
            ChatRequest(model=self.model, messages=self.messages),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=self._format(),
            tools=None if self.tools is None else [Tool("function", tool) for tool in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            service_tier=self.service_tier,
        )

    def _format(self) -> ResponseFormat | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None:
            return None
        schema = JsonSchema(name=wanted.name, schema=wanted.schema, strict=wanted.strict)
        return ResponseFormat(type=wanted.type, json_schema=schema)


_NULL = ("null",)
_UNSERVED: Unserved = {
    "background": ("null", "false"),
    "conversation": _NULL,
    "max_tool_calls": _NULL,
    "previous_response_id": _NULL,
    "prompt": _NULL,
    "reasoning": ("null", "{}"),
    "truncation": ("null", '"disabled"'),
}


def read_responses(body: bytes) -> ResponsesRequest:
    """Read the body of /v1/responses. Raises RequestError."""
    refuse_unserved(decode_body(body, dict[str, msgspec.Raw]), _UNSERVED)
    request = decode_body(body, ResponsesRequest)
    if not request.input:
        raise RequestError("`input` is empty", param="input")
    return request


def _messages(items: list[InputItem]) -> list[ChatMessage]:
    """One for each item; but thoughts, text and calls that follow one another are one turn."""
    messages = list[ChatMessage]()
    for item in items:
        message = _message(item)
        if item.type == "reasoning" and not message.reasoning_content:
            continue  # there may be a summary alone, or what others encrypted
        turn = messages[-1] if messages and messages[-1].role == "assistant" else None
        joined = None if turn is None else _joined(turn, message)
        if joined is None:
            messages.append(message)
        else:
            messages[-1] = joined
    return messages


def _joined(turn: ChatMessage, more: ChatMessage) -> ChatMessage | None:
    """A turn of the assistant with its next item; None where that is a turn of its own."""
    if more.tool_calls and turn.tool_calls:
        turn.tool_calls.extend(more.tool_calls)
        return turn
    if more.tool_calls:
        return msgspec.structs.replace(turn, tool_calls=more.tool_calls)
    only_thought = turn.content is None and not turn.tool_calls
    if more.role == "assistant" and more.reasoning_content is None and only_thought:
        return msgspec.structs.replace(turn, content=more.content)
    return None


def _message(item: InputItem) -> ChatMessage:
    match item.type:
        case "reasoning":
            return ChatMessage(role="assistant", reasoning_content=_text(item.content))
        case "function_call":
            call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id)
            return ChatMessage(role="assistant", tool_calls=[call])
        case "function_call_output":
            return ChatMessage(role="tool", tool_call_id=item.call_id, content=_text(item.output))
        case "message":
            return ChatMessage(role=item.role, content=_text(item.content))


def _text(content: str | list[InputPart] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""

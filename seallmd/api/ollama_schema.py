"""What Ollama's clients send: the bodies of /api/generate, /api/chat, /api/embed and /api/embeddings.

Owns their fields and defaults, and turning them into our own requests (`schema`). Must not know aiohttp or
the engine.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from seallmd.api.conversation import ChatMessage, FunctionCall, ToolCall
from seallmd.api.embeddings import MAX_INPUTS
from seallmd.api.fields import Penalty, StopString, Unserved, decode_body, refuse_unserved
from seallmd.api.schema import ChatRequest, CompletionRequest
from seallmd.api.structured import JsonSchema, ResponseFormat
from seallmd.api.tools import Tool
from seallmd.errors import RequestError

# Go's, and plain seconds. Possessive: nothing is tried twice, or a row of digits would take for ever.
_DURATION = re.compile(r"^[+-]?(?:\d++(?:\.\d++)?(?:ns|us|µs|ms|s|m|h)?+)++$")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|)")
_LONGEST_SECONDS = 3.2e9  # a century: longer ones have no date
_SECONDS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling, with Ollama's names and defaults. num_predict: most tokens; 0 or less is all that fit.

    repeat_penalty covers prompt and output, where Ollama looks at the last `repeat_last_n` tokens: so it is
    off unless asked for.
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    num_predict: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=1000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class KeepingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What all have in common. keep_alive: how long the model stays after this request if nobody else needs
    its memory; 0 unloads, a negative one is for good, none changes nothing."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    options: Options | None = None
    keep_alive: float | str | None = None

    @property
    def unloads(self) -> bool:
        """Whether keep_alive is 0: the model is to go once the answer is out."""
        if isinstance(self.keep_alive, str):
            return re.search("[1-9]", self.keep_alive) is None
        return self.keep_alive == 0

    @property
    def keep_seconds(self) -> float | None:
        """keep_alive in seconds, 0 = for good; None where it was not given, or unloads."""
        if self.keep_alive is None or self.unloads:
            return None
        if isinstance(self.keep_alive, float):
            return min(max(0.0, self.keep_alive), _LONGEST_SECONDS)
        parts = _PART.findall(self.keep_alive)
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
        return 0.0 if self.keep_alive.startswith("-") else min(seconds, _LONGEST_SECONDS)


class OllamaRequest(KeepingRequest, frozen=True, kw_only=True):
    """What /api/generate and /api/chat have in common. think: the template's default unless given."""

    stream: bool | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`think` as the templates of models that think know it: each family by a name of its own."""
        if self.think is None:
            return {}
        effort = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
        return {"enable_thinking": bool(self.think), "thinking": bool(self.think), **effort}

    @property
    def response_format(self) -> ResponseFormat | None:
        """`format` as OpenAI has it: any JSON object, or what a schema describes."""
        if not self.format:
            return None
        if self.format == "json":
            return ResponseFormat(type="json_object")
        assert isinstance(self.format, dict)
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=self.format))

    @property
    def streams(self) -> bool:
        """Ollama streams unless told not to."""
        return self.stream is not False


class GenerateRequest(OllamaRequest, frozen=True, kw_only=True):
    """POST /api/generate. Without a prompt the model is loaded, or unloaded. raw: no chat template."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class OllamaFunction(msgspec.Struct, frozen=True):
    """What was called. arguments: as values, where OpenAI has JSON text."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: dict[str, Any] | None = None


class OllamaCall(msgspec.Struct, frozen=True):
    """A call that the assistant made earlier."""

    function: OllamaFunction
    id: str | None = None


class OllamaMessage(msgspec.Struct, frozen=True):
    """One message. tool_name, tool_call_id: of the call that a tool's message answers. images are refused."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], Meta(max_length=0)] | None = None
    tool_calls: Annotated[list[OllamaCall], Meta(max_length=128)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(OllamaRequest, frozen=True, kw_only=True):
    """POST /api/chat. Without messages the model is loaded, or unloaded."""

    messages: Annotated[list[OllamaMessage], Meta(max_length=1 << 16)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/show. name: as older clients call it."""

    model: Annotated[str, Meta(max_length=256)] = ""
    name: Annotated[str, Meta(max_length=256)] = ""


class EmbedRequest(KeepingRequest, frozen=True, kw_only=True):
    """POST /api/embed. Without an input the model is loaded, or unloaded. truncate: cut what is longer than
    the context, at its end, unless false. dimensions: keep the first ones."""

    input: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None

    @property
    def texts(self) -> list[str]:
        """The inputs."""
        return [self.input] if isinstance(self.input, str) else list(self.input or ())


class OldEmbedRequest(KeepingRequest, frozen=True, kw_only=True):
    """POST /api/embeddings, the older one: one text, and its vector as it is."""

    prompt: str | None = None


# As in `fields`: known, not served, and the values that change nothing.
_UNSERVED: Unserved = {
    "context": ("null", "[]"),
    "images": ("null", "[]"),
    "logprobs": ("null", "false"),
    "suffix": ("null", '""'),
    "template": ("null", '""'),
    "top_logprobs": ("null", "0"),
}
_UNSERVED_OPTIONS: Unserved = {
    "mirostat": ("null", "0"),
    "tfs_z": ("null", "1", "1.0"),
    "typical_p": ("null", "1", "1.0"),
}


_Request = TypeVar("_Request", GenerateRequest, OllamaChatRequest, EmbedRequest, OldEmbedRequest)


class _Fields(msgspec.Struct, frozen=True):
    options: dict[str, msgspec.Raw] | None = None


def read_generate(body: bytes) -> GenerateRequest:
    """Read the body of /api/generate. Raises RequestError."""
    _refuse(body)
    return _checked(decode_body(body, GenerateRequest))


def read_ollama_chat(body: bytes) -> OllamaChatRequest:
    """Read the body of /api/chat. Raises RequestError."""
    _refuse(body)
    return _checked(decode_body(body, OllamaChatRequest))


def read_embed(body: bytes) -> EmbedRequest:
    """Read the body of /api/embed. Raises RequestError."""
    return _checked(decode_body(body, EmbedRequest))


def read_old_embed(body: bytes) -> OldEmbedRequest:
    """Read the body of /api/embeddings. Raises RequestError."""
    return _checked(decode_body(body, OldEmbedRequest))


def read_show(body: bytes) -> str:
    """The model that the body of /api/show names. Raises RequestError."""
    spec = decode_body(body, ShowRequest)
    if not spec.model and not spec.name:
        raise RequestError("`model` is needed", param="model")
    return spec.model or spec.name


def prompt_messages(spec: GenerateRequest) -> list[ChatMessage]:
    """The conversation that /api/generate means where the model has a template."""
    system = [ChatMessage(role="system", content=spec.system)] if spec.system else []
    return [*system, ChatMessage(role="user", content=spec.prompt)]


def chat_messages(spec: OllamaChatRequest) -> list[ChatMessage]:
    """The conversation of /api/chat.

    Ollama's clients tell no ids of calls, which some templates insist on: results then answer calls in order.
    """
    messages, open_calls, made = list[ChatMessage](), deque[str](), 0
    for message in spec.messages or ():
        calls = list[ToolCall]()
        for call in message.tool_calls or ():
            made += 1
            arguments = msgspec.json.encode(call.function.arguments or {}).decode()
            id_ = call.id or f"call{made:05}"  # nine letters and digits, as Mistral's template wants them
            calls.append(ToolCall(FunctionCall(call.function.name, arguments), id_))
            open_calls.append(id_)
        answered = message.tool_call_id
        if message.role == "tool" and open_calls:
            first = open_calls.popleft()
            answered = answered or first
        messages.append(
            ChatMessage(
                role=message.role,
                content=message.content,
                name=message.tool_name,
                tool_call_id=answered,
                tool_calls=calls or None,
                reasoning_content=message.thinking,
            )
        )
    return messages


def as_chat(spec: OllamaRequest, name: str, messages: list[ChatMessage]) -> ChatRequest:
    """The same as our own chat request, but for its limit."""
    return msgspec.structs.replace(
        ChatRequest(model=name, messages=messages),
        **_sampling(spec),
        chat_template_kwargs=spec.template_kwargs,
        tools=spec.tools if isinstance(spec, OllamaChatRequest) else None,
    )


def as_completion(spec: OllamaRequest, name: str, prompt: str) -> CompletionRequest:
    """The same as our own completion request, but for its limit."""
    return msgspec.structs.replace(CompletionRequest(model=name, prompt=prompt), **_sampling(spec))


def output_limit(spec: OllamaRequest, room: int) -> int:
    """Most tokens of the output. room: what the context leaves for it.

    More than fits is no error in Ollama. Without any room our own check tells the numbers.
    """
    wanted = (spec.options or Options()).num_predict or 0
    return max(1, min(wanted, room) if wanted > 0 else room)


def _sampling(spec: OllamaRequest) -> dict[str, Any]:
    options = spec.options or Options()
    return {
        "temperature": 0.8 if options.temperature is None else options.temperature,
        "top_k": 40 if options.top_k is None else options.top_k,
        "top_p": 0.9 if options.top_p is None else options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "stop": options.stop,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "response_format": spec.response_format,
        "stream": spec.streams,
    }


def _refuse(body: bytes) -> None:
    fields = decode_body(body, dict[str, msgspec.Raw])
    refuse_unserved(fields, _UNSERVED)
    refuse_unserved(decode_body(body, _Fields).options or {}, _UNSERVED_OPTIONS)


def _checked(spec: _Request) -> _Request:
    keep = spec.keep_alive
    if isinstance(keep, str) and not _DURATION.match(keep):
        raise RequestError(f"`keep_alive` is no duration: {keep[:40]!r}", param="keep_alive")
    return spec

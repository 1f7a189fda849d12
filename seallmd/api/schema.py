"""What clients send: the bodies of /v1/completions and /v1/chat/completions.

Owns the fields, their types and ranges (OpenAI's, with vLLM's extras), and reading them into structs. What
depends on the model (vocabulary, context) is checked in `limits`. Must not know aiohttp or the engine.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # of one request: prompts times n
_MAX_ERROR_CHARACTERS = 300

TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Salt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")]


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: a last chunk with usage. continuous_usage_stats: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints have in common. A null is the same as leaving the field out."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1000)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Salt | None = None
    user: str | None = None

    @property
    def output_limit(self) -> int | None:
        """The most tokens that the client wants, None when it did not say."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        """How many choices of each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. prompt: one or several, each a string or token ids."""

    prompt: str | list[str | TokenId | list[TokenId]]


class ContentPart(msgspec.Struct, frozen=True):
    """A piece of a message; only text can be served."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions. chat_template_kwargs: further names for the model's template."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=1 << 16)]
    max_completion_tokens: Tokens | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def output_limit(self) -> int | None:
        """OpenAI's newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# Fields that are known but not served, each with the JSON values that change nothing. Everything else is
# refused: a constraint that is silently ignored hurts more than an error.
_NULL = ("null",)
_OFF = ("null", "false")
_ON = ("null", "true")
_EMPTY = ("null", "[]")
_UNSERVED: dict[str, tuple[str, ...]] = {
    "add_generation_prompt": _ON,
    "add_special_tokens": _NULL,
    "allowed_token_ids": _NULL,
    "audio": _NULL,
    "bad_words": _EMPTY,
    "best_of": ("null", "1"),
    "chat_template": _NULL,
    "continue_final_message": _OFF,
    "documents": _EMPTY,
    "ebnf": _NULL,
    "echo": _OFF,
    "function_call": ("null", '"none"', '"auto"'),
    "functions": _EMPTY,
    "grammar": _NULL,
    "guided_choice": _NULL,
    "guided_decoding_backend": _NULL,
    "guided_grammar": _NULL,
    "guided_json": _NULL,
    "guided_regex": _NULL,
    "json_schema": _NULL,
    "length_penalty": ("null", "1", "1.0"),
    "logits_processors": _EMPTY,
    "logprobs": _OFF,
    "lora_path": _NULL,
    "modalities": ("null", '["text"]'),
    "prediction": _NULL,
    "prompt_embeds": _NULL,
    "prompt_logprobs": _NULL,
    "reasoning_effort": _NULL,
    "regex": _NULL,
    "response_format": ("null", '{"type":"text"}'),
    "return_tokens_as_token_ids": _OFF,
    "structured_outputs": _NULL,
    "suffix": ("null", '""'),
    "thinking_token_budget": _NULL,
    "tool_choice": ("null", '"none"', '"auto"'),
    "tools": _EMPTY,
    "top_logprobs": ("null", "0"),
    "truncate_prompt_tokens": _NULL,
    "use_beam_search": _OFF,
    "verbosity": _NULL,
    "web_search_options": _NULL,
}

Body = TypeVar("Body", CompletionRequest, ChatRequest)
Struct = TypeVar("Struct")
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


def read_completion(body: bytes) -> CompletionRequest:
    """Read the body of /v1/completions. Raises RequestError."""
    request = _read(body, CompletionRequest)
    prompts = len(split_prompts(request.prompt))
    if prompts * request.choices > MAX_CHOICES:
        raise RequestError(
            f"{prompts} prompts times n={request.choices} is over {MAX_CHOICES} choices", param="n"
        )
    return request


def read_chat(body: bytes) -> ChatRequest:
    """Read the body of /v1/chat/completions. Raises RequestError."""
    request = _read(body, ChatRequest)
    for name in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
        if name in (request.chat_template_kwargs or {}):
            raise RequestError(f"`chat_template_kwargs` may not set {name!r}", param="chat_template_kwargs")
    if any(message.tool_calls for message in request.messages):
        raise RequestError("`tool_calls` in messages are not supported yet", param="messages")
    return request


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a completion: strings and lists of token ids. Raises RequestError."""
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    elif prompt and all(isinstance(entry, int) for entry in prompt):
        prompts = [[entry for entry in prompt if isinstance(entry, int)]]
    elif all(isinstance(entry, str) for entry in prompt) or all(isinstance(entry, list) for entry in prompt):
        prompts = [entry for entry in prompt if not isinstance(entry, int)]
    else:
        raise RequestError("`prompt` mixes strings and token ids", param="prompt")
    if not prompts or not all(prompts):
        raise RequestError("`prompt` is empty", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(
            f"`prompt` has {len(prompts)} prompts, at most {MAX_PROMPTS} are allowed", param="prompt"
        )
    return prompts


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain values, and each content one string."""
    plain = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        entry = {"role": message.role, "content": content or ""}
        optional = {"name": message.name, "tool_call_id": message.tool_call_id}
        plain.append({**entry, **{key: value for key, value in optional.items() if value is not None}})
    return plain


def decode_body(body: bytes, kind: type[Struct]) -> Struct:
    """A JSON body as a struct. Raises RequestError, with the field at fault in `param`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}"[:_MAX_ERROR_CHARACTERS]) from None


def refuse_unserved(fields: dict[str, msgspec.Raw], unserved: dict[str, tuple[str, ...]]) -> None:
    """Refuse fields that are known but not served, unless their JSON value changes nothing."""
    for name in sorted(fields.keys() & unserved.keys()):
        value = msgspec.json.format(bytes(fields[name]), indent=-1).decode()
        if value not in unserved[name]:
            raise RequestError(f"`{name}` is not supported yet", code="unsupported_parameter", param=name)


def _read(body: bytes, kind: type[Body]) -> Body:
    fields = decode_body(body, dict[str, msgspec.Raw])
    refuse_unserved(fields, _UNSERVED)
    request = decode_body(body, kind)
    if unknown := fields.keys() - set(kind.__struct_fields__) - _UNSERVED.keys():
        _log.debug("unknown fields are ignored: %s", ", ".join(sorted(unknown))[:_MAX_ERROR_CHARACTERS])
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` needs `stream`", param="stream_options")
    return request


def _explain(error: msgspec.ValidationError) -> RequestError:
    """msgspec's text names the place as a path, which is OpenAI's `param`."""
    text = str(error)
    place = _PATH.search(text)
    if place is None:
        missing = re.search(r"missing required field `(\w+)`", text)
        return RequestError(text[:_MAX_ERROR_CHARACTERS], param=missing.group(1) if missing else None)
    param = place.group(1).removesuffix("[...]")[:100]
    reason = text[: place.start()]
    return RequestError(f"`{param}`: {reason}"[:_MAX_ERROR_CHARACTERS], param=param or None)

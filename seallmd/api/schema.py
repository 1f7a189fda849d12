"""What clients send: the bodies of /v1/completions and /v1/chat/completions.

Owns the fields, their types and ranges (OpenAI's, with vLLM's extras), and reading them into structs. What
depends on the model (vocabulary, context) is checked in `limits`. Must not know aiohttp or the engine.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from seallmd.api.conversation import ChatMessage
from seallmd.api.fields import (
    MAX_ERROR_CHARACTERS,
    ModelName,
    Penalty,
    Salt,
    ServiceTier,
    StopString,
    TokenId,
    Tokens,
    Top,
    Unserved,
    decode_body,
    refuse_unserved,
)
from seallmd.api.prompts import split_prompts
from seallmd.api.structured import Form, ResponseFormat, StructuredOutputs, wanted_form
from seallmd.api.tools import Choice as ToolChoice
from seallmd.api.tools import Tool, Tools
from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # of one request: prompts times n


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: a last chunk with usage. continuous_usage_stats: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints have in common. A null is the same as leaving the field out."""

    model: ModelName
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
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=1 << 16)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Top | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Salt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    service_tier: ServiceTier | None = None
    request_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")] | None = None
    user: str | None = None

    @property
    def output_limit(self) -> int | None:
        """The most tokens that the client wants, None when it did not say."""
        return self.max_tokens

    @property
    def output_top(self) -> int:
        """How many of the likeliest ids to tell beside each generated token; -1: no log-probabilities."""
        return -1

    @property
    def prompt_top(self) -> int:
        """The same for tokens of the prompt."""
        return -1 if self.prompt_logprobs is None else self.prompt_logprobs

    @property
    def choices(self) -> int:
        """How many choices of each prompt."""
        return self.n or 1

    @property
    def form(self) -> Form | None:
        """What the output must look like. Raises RequestError."""
        return wanted_form(self.response_format, self.structured_outputs)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. prompt: one or several, each a string or token ids.

    max_tokens: 0 asks for the prompt alone. logprobs: of the likeliest ids, beside each token's own.
    """

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Top | None = None

    @property
    def output_top(self) -> int:
        """As in `GenerationRequest`."""
        return -1 if self.logprobs is None else self.logprobs

    @property
    def prompt_top(self) -> int:
        """An echoed prompt has log-probabilities like the output's."""
        return max(super().prompt_top, self.output_top if self.echo else -1)


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions. chat_template_kwargs: further names for the model's template.

    continue_final_message: the answer goes on where the last message ends.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=1 << 16)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def output_limit(self) -> int | None:
        """OpenAI's newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_top(self) -> int:
        """As in `GenerationRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def offered(self) -> Tools | None:
        """The tools that may be called, if any. Raises RequestError."""
        return Tools.of(self.tools, self.tool_choice, self.parallel_tool_calls)


# A constraint that is silently ignored hurts more than an error: what is known and not served is refused.
_NULL = ("null",)
_OFF = ("null", "false")
_EMPTY = ("null", "[]")
_UNSERVED: Unserved = {
    "audio": _NULL,
    "best_of": ("null", "1"),
    "chat_template": _NULL,
    "documents": _EMPTY,
    "ebnf": _NULL,
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
    "lora_path": _NULL,
    "modalities": ("null", '["text"]'),
    "prediction": _NULL,
    "priority": ("null", "0"),
    "prompt_embeds": _NULL,
    "reasoning_effort": _NULL,
    "regex": _NULL,
    "suffix": ("null", '""'),
    "thinking_token_budget": _NULL,
    "use_beam_search": _OFF,
    "verbosity": _NULL,
    "web_search_options": _NULL,
}
# What one endpoint serves and the other does not have.
_UNSERVED_IN_COMPLETIONS: Unserved = {
    "add_generation_prompt": ("null", "true"),
    "continue_final_message": _OFF,
    "tool_choice": ("null", '"none"', '"auto"'),
    "tools": _EMPTY,
    "top_logprobs": ("null", "0"),
}
_UNSERVED_IN_CHATS: Unserved = {"echo": _OFF}

Body = TypeVar("Body", CompletionRequest, ChatRequest)


def read_completion(body: bytes) -> CompletionRequest:
    """Read the body of /v1/completions. Raises RequestError."""
    request = _read(body, CompletionRequest, _UNSERVED_IN_COMPLETIONS)
    prompts = len(split_prompts(request.prompt, "prompt", MAX_PROMPTS))
    if prompts * request.choices > MAX_CHOICES:
        raise RequestError(
            f"{prompts} prompts times n={request.choices} is over {MAX_CHOICES} choices", param="n"
        )
    if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
        raise RequestError("`max_tokens` of 0 makes sense with `echo` alone", param="max_tokens")
    return request


def read_chat(body: bytes) -> ChatRequest:
    """Read the body of /v1/chat/completions. Raises RequestError."""
    request = _read(body, ChatRequest, _UNSERVED_IN_CHATS)
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"):
        if name in (request.chat_template_kwargs or {}):
            raise RequestError(f"`chat_template_kwargs` may not set {name!r}", param="chat_template_kwargs")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs`", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
    return request


def _read(body: bytes, kind: type[Body], unserved_here: Unserved) -> Body:
    fields = decode_body(body, dict[str, msgspec.Raw])
    unserved = {**_UNSERVED, **unserved_here}
    refuse_unserved(fields, unserved)
    request = decode_body(body, kind)
    if unknown := fields.keys() - set(kind.__struct_fields__) - unserved.keys():
        _log.debug("unknown fields are ignored: %s", ", ".join(sorted(unknown))[:MAX_ERROR_CHARACTERS])
    if request.stream_options is not None and not request.stream:
        raise RequestError("`stream_options` needs `stream`", param="stream_options")
    return request

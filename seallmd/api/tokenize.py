"""POST /tokenize and /detokenize, in vLLM's shapes.

Owns their bodies and answers. Must not know generation; neither wakes a model.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from seallmd.api.conversation import ChatMessage, plain_messages
from seallmd.api.fields import TokenId, decode_body
from seallmd.api.limits import check_token_ids
from seallmd.api.serving import Model, Serving, json_response, read_body
from seallmd.errors import RequestError

_Name = Annotated[str, Meta(min_length=1, max_length=256)]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Either `prompt` or `messages`. add_special_tokens: null means true for a prompt, false for messages."""

    model: _Name
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=1 << 16)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of a model."""

    model: _Name
    tokens: list[TokenId]


class Tokenize:
    """The two endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def routes(self) -> list[web.RouteDef]:
        """POST /tokenize, /detokenize."""
        return [web.post("/tokenize", self.tokenize), web.post("/detokenize", self.detokenize)]

    async def tokenize(self, request: web.Request) -> web.Response:
        """Text or a conversation to token ids."""
        spec = decode_body(await read_body(request), TokenizeRequest)
        model = await self._serving.model(spec.model)
        tokens = await self._encode(model, spec)
        strings = None
        if spec.return_token_strs:
            strings = await asyncio.to_thread(_names, model, tokens)
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": model.shape.context,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """Token ids to text, special tokens included."""
        spec = decode_body(await read_body(request), DetokenizeRequest)
        model = await self._serving.model(spec.model)
        check_token_ids(spec.tokens, model.shape.vocab, "tokens")
        return json_response({"prompt": await self._serving.texts.decode(model.text, spec.tokens)})

    async def _encode(self, model: Model, spec: TokenizeRequest) -> list[int]:
        if (spec.prompt is None) == (spec.messages is None):
            raise RequestError("either `prompt` or `messages` is needed", param="prompt")
        if spec.messages is None:
            special = spec.add_special_tokens is not False
            return await self._serving.texts.encode(model.text, spec.prompt or "", add_special_tokens=special)
        return await self._serving.texts.encode_chat(
            model.text,
            plain_messages(spec.messages),
            spec.chat_template_kwargs or {},
            add_generation_prompt=spec.add_generation_prompt is not False,
            add_special_tokens=bool(spec.add_special_tokens),
        )


def _names(model: Model, tokens: list[int]) -> list[str]:
    return [model.text.tokenizer.id_to_token(token) or "" for token in tokens]

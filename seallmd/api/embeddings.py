"""POST /v1/embeddings, in OpenAI's shapes.

Owns its body and answer. Must not know how vectors are made (`embedding`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from aiohttp import web
from msgspec import Meta

from seallmd.api.batch.runner import Endpoint
from seallmd.api.embedding import Vector, Wanted, embed, pooling_of
from seallmd.api.fields import ModelName, Salt, TokenId, Unserved, decode_body, refuse_unserved
from seallmd.api.limits import last_of
from seallmd.api.prompts import split_prompts
from seallmd.api.serving import Serving, json_response, read_body

MAX_INPUTS = 2048

# As in `fields`. Audio, pictures and chats as input are vLLM's.
_UNSERVED: Unserved = {"messages": ("null", "[]"), "priority": ("null", "0"), "prompt_embeds": ("null",)}


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings. input: one or several, each a string or token ids.

    dimensions: keep the first ones, for models that were trained so that these mean something by themselves
    (Matryoshka). normalize: vLLM's, to length 1 unless false.
    """

    model: ModelName
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    cache_salt: Salt | None = None
    user: str | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: a vector for each input, in their order."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class Embeddings:
    """The endpoint."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def routes(self) -> list[web.RouteDef]:
        """POST /v1/embeddings."""
        return [web.post("/v1/embeddings", self.embeddings)]

    def endpoints(self) -> dict[str, Endpoint]:
        """The same for the lines of batches."""
        return {"/v1/embeddings": self.embed}

    async def embeddings(self, request: web.Request) -> web.Response:
        """A vector for each input."""
        return await self.embed(await read_body(request))

    async def embed(self, body: bytes) -> web.Response:
        """The same for a body from anywhere."""
        refuse_unserved(decode_body(body, dict[str, msgspec.Raw]), _UNSERVED)
        spec = decode_body(body, EmbeddingRequest)
        given = split_prompts(spec.input, "input", MAX_INPUTS)
        pooling_of(self._serving, spec.model)
        model = await self._serving.model(spec.model)
        special = spec.add_special_tokens is not False
        encoded = [await self._serving.encode(model, text, add_special_tokens=special) for text in given]
        inputs = [last_of(tokens, spec.truncate_prompt_tokens, model.shape.context) for tokens in encoded]
        wanted = Wanted(spec.dimensions, spec.normalize is not False)
        vectors = await embed(self._serving, model, inputs, wanted, spec.cache_salt or "")
        tokens = sum(map(len, inputs))
        # Half a second, for the most and largest vectors.
        return await asyncio.to_thread(_answer, spec, vectors, EmbeddingUsage(tokens, tokens))


def _answer(spec: EmbeddingRequest, vectors: Sequence[Vector], usage: EmbeddingUsage) -> web.Response:
    packed = spec.encoding_format == "base64"
    data = [
        Embedding(index=index, embedding=_packed(vector) if packed else vector.tolist())
        for index, vector in enumerate(vectors)
    ]
    return json_response(EmbeddingList(data=data, model=spec.model, usage=usage))


def _packed(vector: Vector) -> str:
    return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()

"""Ollama's API, as far as its clients need it to talk to the models that are served.

Owns the endpoints below /api/, and the greeting at /. Must not know how requests are generated (`serving`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal

import msgspec
from aiohttp import web

from seallmd import __version__
from seallmd.api.chats import prepare, reads_reasoning
from seallmd.api.embedding import Vector, Wanted, embed, pooling_of
from seallmd.api.ollama_responses import OllamaAnswer, model_card, running_card, shown_card
from seallmd.api.ollama_schema import (
    KeepingRequest,
    OllamaRequest,
    as_chat,
    as_completion,
    chat_messages,
    output_limit,
    prompt_messages,
    read_embed,
    read_generate,
    read_old_embed,
    read_ollama_chat,
    read_show,
)
from seallmd.api.schema import ChatRequest, CompletionRequest
from seallmd.api.serving import Model, Serving, Turn, json_response, read_body, receive
from seallmd.api.text import TextModel
from seallmd.api.wire import LINES
from seallmd.core.settings import ServiceSettings
from seallmd.errors import ControlError, RequestError

_log = logging.getLogger(__name__)
_FORM = "application/x-www-form-urlencoded"

_Kind = Literal["generate", "chat"]


class Ollama:
    """The endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._engine = serving.engine
        self._unloading: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        """Everything below /api/, and what clients look for before they go there."""
        return [
            web.get("/", self.greet),
            web.get("/api/version", self.version),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.running),
            web.post("/api/show", self.show),
            web.post("/api/generate", self.generate),
            web.post("/api/chat", self.chat),
            web.post("/api/embed", self.embed),
            web.post("/api/embeddings", self.old_embed),
        ]

    async def greet(self, _request: web.Request) -> web.Response:
        """GET and HEAD /: whether somebody is there, in the very words that some clients compare."""
        return web.Response(text="Ollama is running")

    async def version(self, _request: web.Request) -> web.Response:
        """Ours: nobody should take us for an Ollama."""
        return json_response({"version": __version__})

    async def tags(self, _request: web.Request) -> web.Response:
        """Every configured service, but those that cannot be served."""
        views = [view for view in self._serving.views() if not view.reason]
        return json_response({"models": [model_card(view) for view in views]})

    async def running(self, _request: web.Request) -> web.Response:
        """Services on a device."""
        views = {view.settings.name: view for view in self._serving.views()}
        resident = [s for s in self._engine.status().services if s.state == "resident" and s.name in views]
        return json_response({"models": [running_card(views[s.name], s) for s in resident]})

    async def show(self, request: web.Request) -> web.Response:
        """POST /api/show: what is known of a model; wakes none."""
        name = self._name(read_show(await _body(request)))
        model = await self._serving.model(name)
        view, template = self._serving.view(name), model.text.template
        source = template.source if template is not None else ""
        return json_response(shown_card(view, source, _capabilities(view.settings, model.text)))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST /api/generate: a prompt, through the model's chat template unless it is raw."""
        spec = read_generate(await _body(request))
        name = self._name(spec.model)
        if not spec.prompt:
            return await self._place_only(spec, name, "generate")
        model = await self._serving.model(name)
        if not spec.raw and model.text.template is not None:
            return await self._converse(request, spec, as_chat(spec, name, prompt_messages(spec)), "generate")
        for field in ("system", "think"):
            if getattr(spec, field):
                raise RequestError(f"`{field}` needs a chat template", param=field)
        tokens = await self._serving.encode(model, spec.prompt)
        ours = as_completion(spec, name, spec.prompt)
        return await self._answer(request, spec, ours, model, tokens, "generate")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /api/chat: a conversation."""
        spec = read_ollama_chat(await _body(request))
        name = self._name(spec.model)
        if not spec.messages:
            return await self._place_only(spec, name, "chat")
        return await self._converse(request, spec, as_chat(spec, name, chat_messages(spec)), "chat")

    async def embed(self, request: web.Request) -> web.Response:
        """POST /api/embed: a vector of length 1 for each input."""
        began = time.monotonic_ns()
        spec = read_embed(await _body(request))
        wanted = Wanted(spec.dimensions or None)
        vectors, tokens = await self._embed(spec, spec.texts, wanted, truncate=spec.truncate is not False)
        answer = {
            "model": spec.model,
            "embeddings": [vector.tolist() for vector in vectors],
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
        return await asyncio.to_thread(json_response, answer)

    async def old_embed(self, request: web.Request) -> web.Response:
        """POST /api/embeddings: one vector, not scaled."""
        spec = read_old_embed(await _body(request))
        texts = [spec.prompt] if spec.prompt else []
        vectors, _ = await self._embed(spec, texts, Wanted(normalize=False), truncate=True)
        return json_response({"embedding": vectors[0].tolist() if vectors else []})

    async def _embed(
        self, spec: KeepingRequest, texts: list[str], wanted: Wanted, *, truncate: bool
    ) -> tuple[list[Vector], int]:
        """Vectors of texts, and how many tokens these have. Without any text the model comes in, or goes."""
        name = self._name(spec.model)
        pooling_of(self._serving, name)
        if not any(texts):
            await self._place(spec, name)
            return [], 0
        model = await self._serving.model(name)
        encoded = [await self._serving.encode(model, text) for text in texts]
        inputs = [tokens[: model.shape.context] if truncate else tokens for tokens in encoded]
        self._keep(spec, name)
        try:
            return await embed(self._serving, model, inputs, wanted), sum(map(len, inputs))
        finally:
            if spec.unloads:
                self._unload_later(name)

    async def _converse(
        self, request: web.Request, spec: OllamaRequest, ours: ChatRequest, kind: _Kind
    ) -> web.StreamResponse:
        model = await self._serving.model(ours.model)
        if spec.think and not reads_reasoning(self._serving.view(ours.model).settings, model.text):
            raise RequestError(f"the model {ours.model!r} does not support thinking", param="think")
        chat = await prepare(self._serving, ours)
        return await self._answer(request, spec, ours, model, chat.prompt, kind, chat.turn)

    async def _answer(
        self,
        request: web.Request,
        spec: OllamaRequest,
        ours: CompletionRequest | ChatRequest,
        model: Model,
        tokens: list[int],
        kind: _Kind,
        turn: Turn | None = None,
    ) -> web.StreamResponse:
        limit = output_limit(spec, model.shape.context - len(tokens))
        ours = msgspec.structs.replace(ours, max_tokens=limit)
        answer = OllamaAnswer(spec.model, kind, None if turn is None else turn.format)
        self._keep(spec, model.name)
        try:
            return await self._serving.generate(request, ours, model, [tokens], answer, LINES, turn)
        finally:
            if spec.unloads:
                self._unload_later(model.name)

    async def _place_only(self, spec: OllamaRequest, name: str, kind: _Kind) -> web.Response:
        await self._place(spec, name)
        return json_response(OllamaAnswer(spec.model, kind).nothing("unload" if spec.unloads else "load"))

    async def _place(self, spec: KeepingRequest, name: str) -> None:
        """Load the model, or with keep_alive 0 unload it; returns when that is done."""
        try:
            if spec.unloads:
                self._refuse_pinned(name)
                await self._engine.evict(name, False)
            else:
                self._keep(spec, name)
                await self._engine.load(name)
        except ControlError as error:
            raise RequestError(str(error), status=503, code="model_unavailable") from error

    def _keep(self, spec: KeepingRequest, name: str) -> None:
        if spec.keep_seconds is not None:
            self._engine.keep(name, spec.keep_seconds)

    def _refuse_pinned(self, name: str) -> None:
        """A pinned service leaves by an operator's word alone."""
        if self._serving.view(name).settings.pinned:
            raise RequestError(f"the model {name!r} is pinned", status=403, code="model_pinned")

    def _unload_later(self, name: str) -> None:
        """The client has its answer: whether the model can go now is not its concern."""
        view = self._engine.service(name)
        if view is None or view.settings.pinned:
            return
        task = asyncio.create_task(self._unload(name))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self, name: str) -> None:
        try:
            await self._engine.evict(name, False)
        except ControlError as error:
            _log.info("%s stays: %s", name, error)

    def _name(self, name: str) -> str:
        """The service that is meant; Ollama's clients add a tag. Raises RequestError (404)."""
        if self._engine.service(name) is None:
            name = name.removesuffix(":latest")
        return self._serving.view(name).settings.name


async def _body(request: web.Request) -> bytes:
    """The body. Ollama's documentation shows curl without a content type, which is then a form's; one that
    comes from a web page is told by its Origin."""
    if request.content_type == _FORM and "Origin" not in request.headers:
        return await receive(request)
    return await read_body(request)


def _capabilities(settings: ServiceSettings, model: TextModel) -> list[str]:
    """What clients may ask for, in Ollama's words."""
    has = {
        "completion": True,
        "tools": model.template is not None and settings.tool_parser != "none",
        "thinking": reads_reasoning(settings, model),
        "embedding": settings.pooling != "none",
    }
    return [name for name, there in has.items() if there]

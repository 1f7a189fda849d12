"""Ollama's API, as far as its clients need it to talk to the models that are served.

Owns the endpoints below /api/. Must not know how requests are generated (`serving`).
"""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from seallmd import __version__
from seallmd.api.conversation import ChatMessage, plain_messages
from seallmd.api.ollama_responses import OllamaAnswer, model_card, running_card
from seallmd.api.ollama_schema import (
    GenerateRequest,
    OllamaChatRequest,
    OllamaRequest,
    as_chat,
    as_completion,
    chat_messages,
    read_generate,
    read_ollama_chat,
)
from seallmd.api.schema import ChatRequest, CompletionRequest
from seallmd.api.serving import Model, Serving, json_response, read_body
from seallmd.api.wire import LINES
from seallmd.errors import ControlError, RequestError

_log = logging.getLogger(__name__)
_FORM = "application/x-www-form-urlencoded"


class Ollama:
    """The endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._engine = serving.engine
        self._unloading: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        """Everything below /api/."""
        return [
            web.get("/api/version", self.version),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.running),
            web.post("/api/generate", self.generate),
            web.post("/api/chat", self.chat),
        ]

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

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """POST /api/generate: a prompt, through the model's chat template unless it is raw."""
        spec = read_generate(await _body(request))
        name = self._name(spec.model)
        answer = OllamaAnswer(spec.model, "generate")
        if not spec.prompt:
            return await self._place(spec, name, answer)
        model = await self._serving.model(name)
        if spec.raw or model.text.template is None:
            if spec.system:
                raise RequestError("`system` needs a chat template", param="system")
            tokens = await self._serving.encode(model, spec.prompt)
            ours: CompletionRequest | ChatRequest = as_completion(
                spec, name, spec.prompt, _room(model, tokens)
            )
        else:
            messages = chat_messages(spec)
            tokens = await self._encode(model, messages)
            ours = as_chat(spec, name, messages, _room(model, tokens))
        return await self._answer(request, spec, ours, model, tokens, answer)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /api/chat: a conversation."""
        spec = read_ollama_chat(await _body(request))
        name = self._name(spec.model)
        answer = OllamaAnswer(spec.model, "chat")
        if not spec.messages:
            return await self._place(spec, name, answer)
        model = await self._serving.model(name)
        messages = [ChatMessage(role=message.role, content=message.content) for message in spec.messages]
        tokens = await self._encode(model, messages)
        ours = as_chat(spec, name, messages, _room(model, tokens))
        return await self._answer(request, spec, ours, model, tokens, answer)

    async def _encode(self, model: Model, messages: list[ChatMessage]) -> list[int]:
        return await self._serving.texts.encode_chat(model.text, plain_messages(messages), {})

    async def _answer(
        self,
        request: web.Request,
        spec: OllamaRequest,
        ours: CompletionRequest | ChatRequest,
        model: Model,
        tokens: list[int],
        answer: OllamaAnswer,
    ) -> web.StreamResponse:
        self._keep(spec, model.name)
        try:
            return await self._serving.generate(request, ours, model, [tokens], answer, LINES)
        finally:
            if spec.unloads:
                self._unload_later(model.name)

    async def _place(
        self, spec: GenerateRequest | OllamaChatRequest, name: str, answer: OllamaAnswer
    ) -> web.Response:
        """Load the model, or with keep_alive 0 unload it, and answer when that is done."""
        try:
            if spec.unloads:
                self._refuse_pinned(name)
                await self._engine.evict(name, False)
            else:
                self._keep(spec, name)
                await self._engine.load(name)
        except ControlError as error:
            raise RequestError(str(error), status=503, code="model_unavailable") from error
        return json_response(answer.nothing("unload" if spec.unloads else "load"))

    def _keep(self, spec: OllamaRequest, name: str) -> None:
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
        plain = name.removesuffix(":latest")
        if self._engine.service(name) is None and self._engine.service(plain) is not None:
            return plain
        return self._serving.view(name).settings.name


async def _body(request: web.Request) -> bytes:
    """The body. Ollama's documentation shows curl without a content type, which is then a form's; one that
    comes from a web page is told by its Origin."""
    if request.content_type == _FORM and "Origin" not in request.headers:
        return await request.read()
    return await read_body(request)


def _room(model: Model, tokens: list[int]) -> int:
    return model.shape.context - len(tokens)

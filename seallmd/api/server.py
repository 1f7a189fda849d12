"""The HTTP side: OpenAI's API on TCP and on a Unix socket.

Owns the routes, and the life of one HTTP request from its body to its last byte. Must not know how the engine
works (`EngineFace` is all it sees) nor the details of bodies, which `schema` and `responses` hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from seallmd.api.choices import Choice, Piece, Run
from seallmd.api.limits import build_generations
from seallmd.api.problems import INTERNAL, error_body, problems
from seallmd.api.responses import Answer, ChatAnswer, CompletionAnswer, Usage, count_usage, join
from seallmd.api.schema import (
    CompletionRequest,
    GenerationRequest,
    plain_messages,
    read_chat,
    read_completion,
    split_prompts,
)
from seallmd.api.settings import HttpSettings
from seallmd.api.sockets import claim_socket_path
from seallmd.api.text import TextModel, TextModels
from seallmd.core.messages import ModelShape
from seallmd.errors import ConfigError, ControlError, RequestError
from seallmd.runtime.face import EngineFace, ServiceView

_log = logging.getLogger(__name__)

_PROBE_WAIT_SECONDS = 60.0
_PROBE_POLL_SECONDS = 0.1
_SHUTDOWN_SECONDS = 10.0
_EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # or nginx collects the stream
}


def build_app(engine: EngineFace, settings: HttpSettings) -> web.Application:
    """The application. Its runner needs handler_cancellation, as `start_http` sets it: without that, a client
    that leaves before its first token is not noticed."""
    endpoints = Endpoints(engine)
    app = web.Application(middlewares=[problems], client_max_size=settings.max_body_bytes)
    app.router.add_get("/health", endpoints.health)
    app.router.add_get("/v1/models", endpoints.models)
    app.router.add_get("/v1/models/{name}", endpoints.model)
    app.router.add_post("/v1/completions", endpoints.completions)
    app.router.add_post("/v1/chat/completions", endpoints.chat)
    app.on_cleanup.append(endpoints.close)
    return app


async def start_http(engine: EngineFace, settings: HttpSettings) -> web.AppRunner:
    """Listen where the settings say; `cleanup()` of the result ends it. Raises ConfigError."""
    bound: list[Path] = []  # removed at the end, but only if they are ours
    app = build_app(engine, settings)

    async def remove_sockets(_app: web.Application) -> None:
        for path in bound:
            path.unlink(missing_ok=True)

    app.on_cleanup.append(remove_sockets)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        keepalive_timeout=settings.keep_alive_seconds,
        shutdown_timeout=_SHUTDOWN_SECONDS,
        access_log=None,
    )
    await runner.setup()
    try:
        if settings.host:
            await web.TCPSite(runner, settings.host, settings.port).start()
        if settings.socket:
            claim_socket_path(Path(settings.socket))
            await web.UnixSite(runner, settings.socket).start()
            bound.append(Path(settings.socket))
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"http: cannot listen: {error.strerror or error}") from error
    except ControlError as error:
        await runner.cleanup()
        raise ConfigError(f"http: {error}") from error
    return runner


class Endpoints:
    """The handlers of all routes."""

    def __init__(self, engine: EngineFace) -> None:
        self._engine = engine
        self._texts = TextModels()

    async def close(self, _app: web.Application) -> None:
        """Called when the application ends."""
        await self._texts.close()

    # ---------------------------------------------------------------------------------- small ones

    async def health(self, _request: web.Request) -> web.Response:
        """200 when every device is up, else 503 with the reason."""
        devices = self._engine.status().devices
        down = [f"device {device.device} is {device.state}" for device in devices if device.state != "up"]
        if down or not devices:
            raise RequestError("; ".join(down) or "there is no device", status=503, code="unhealthy")
        return _json({"status": "ok"})

    async def models(self, _request: web.Request) -> web.Response:
        """Every configured service, served or not."""
        return _json({"object": "list", "data": [_card(view) for view in self._engine.services()]})

    async def model(self, request: web.Request) -> web.Response:
        """One service."""
        return _json(_card(self._view(request.match_info["name"])))

    # -------------------------------------------------------------------------------- generation

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        spec = read_completion(await _body(request))
        shape, text = await self._model(spec.model)
        prompts = [await self._encode(text, prompt) for prompt in split_prompts(spec.prompt)]
        answer = CompletionAnswer(spec.model, token_ids=bool(spec.return_token_ids))
        return await self._generate(request, spec, shape, text, prompts, answer)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        spec = read_chat(await _body(request))
        shape, text = await self._model(spec.model)
        messages = plain_messages(spec.messages)
        prompt = await self._texts.encode_chat(text, messages, spec.chat_template_kwargs or {})
        answer = ChatAnswer(spec.model, token_ids=bool(spec.return_token_ids))
        return await self._generate(request, spec, shape, text, [prompt], answer)

    async def _encode(self, text: TextModel, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return await self._texts.encode(text, prompt, add_special_tokens=True)

    def _view(self, name: str) -> ServiceView:
        view = self._engine.service(name)
        if view is None:
            message = f"the model {name[:128]!r} does not exist"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        return view

    async def _model(self, name: str) -> tuple[ModelShape, TextModel]:
        """A service's shape and text side; at start this waits until the service was examined."""
        view = self._view(name)
        for _ in range(int(_PROBE_WAIT_SECONDS / _PROBE_POLL_SECONDS)):
            if view.reason:
                message = f"the model {name!r} cannot be served: {view.reason}"
                raise RequestError(message, status=503, code="model_unavailable", param="model")
            if view.shape is not None and view.directory is not None:
                return view.shape, await self._texts.get(view.directory)
            await asyncio.sleep(_PROBE_POLL_SECONDS)
            view = self._view(name)
        message = f"the model {name!r} is still being examined"
        raise RequestError(message, status=503, code="model_loading", retry_after=10.0)

    async def _generate(
        self,
        request: web.Request,
        spec: GenerationRequest,
        shape: ModelShape,
        text: TextModel,
        prompts: list[list[int]],
        answer: Answer,
    ) -> web.StreamResponse:
        """Run all choices of all prompts; whatever happens, none outlives the HTTP request."""
        # Everything is checked before anything is started.
        batches = [build_generations(spec, shape, prompt) for prompt in prompts]
        run = Run(self._engine)
        try:
            for generations in batches:
                for generation, stream in zip(generations, run.submit(generations), strict=True):
                    prime = generation.prompt if isinstance(spec, CompletionRequest) else ()
                    choice = Choice(
                        len(run.choices),
                        generation,
                        stream,
                        text.detokenizer(prime, skip_special=spec.skip_special_tokens is not False),
                        spec.stops,
                        include_stop=bool(spec.include_stop_str_in_output),
                    )
                    run.choices.append(choice)
            if spec.stream:
                return await _stream(request, spec, run, answer)
            return await _whole(spec, run, answer)
        finally:
            await run.close()


# ------------------------------------------------------------------------------------------ responses


async def _whole(spec: GenerationRequest, run: Run, answer: Answer) -> web.Response:
    parts: list[list[Piece]] = [[] for _ in run.choices]
    async for piece in run.pieces():
        parts[piece.index].append(piece)
    usage = count_usage(run.choices, spec.choices)
    return _json(answer.whole(run.choices, [join(pieces) for pieces in parts], usage))


async def _stream(
    request: web.Request, spec: GenerationRequest, run: Run, answer: Answer
) -> web.StreamResponse:
    """Server-sent events. Headers wait for the first piece, so that an earlier failure has its own status."""
    pieces = run.pieces()
    first = await anext(pieces)
    response = web.StreamResponse(headers=_EVENT_HEADERS)
    # A client that leaves is no failure: there is nobody left to tell.
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        try:
            async for event in _events(spec, run, answer, first, pieces):
                await response.write(event)
        except RequestError as error:
            await response.write(_event(error_body(error)))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - headers are sent: the middleware could not answer any more
            _log.exception("%s failed in mid-stream", request.path)
            await response.write(_event(error_body(INTERNAL)))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


async def _events(
    spec: GenerationRequest, run: Run, answer: Answer, first: Piece, rest: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    options = spec.stream_options
    want_usage = options is not None and bool(options.include_usage)
    continuous = want_usage and options is not None and bool(options.continuous_usage_stats)

    def events(piece: Piece) -> list[bytes]:
        usage: Usage | UnsetType | None = None if want_usage else UNSET
        if continuous:
            usage = count_usage(run.choices, spec.choices)
        chunks = answer.chunks(run.choices[piece.index], piece, usage)
        return [_event(msgspec.json.encode(chunk)) for chunk in chunks]

    for event in events(first):
        yield event
    async for piece in rest:
        for event in events(piece):
            yield event
    if want_usage:
        yield _event(msgspec.json.encode(answer.usage_chunk(count_usage(run.choices, spec.choices))))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def _card(view: ServiceView) -> dict[str, object]:
    """A model as OpenAI describes it; max_model_len is vLLM's name for the context limit."""
    card: dict[str, object] = {
        "id": view.settings.name,
        "object": "model",
        "created": view.created,
        "owned_by": "seallmd",
    }
    return card if view.shape is None else {**card, "max_model_len": view.shape.context}


async def _body(request: web.Request) -> bytes:
    """The body. Raises RequestError for what says it is not JSON: a web page's form needs no permission."""
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise RequestError("the body must be application/json", status=415)
    return await request.read()

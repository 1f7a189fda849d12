"""The HTTP side: its routes, on TCP and on a Unix socket.

Owns the application, where it listens, and the endpoints of OpenAI's API and of operation. Must not know how
the engine works (`EngineFace` is all it sees) nor how requests are generated, which `serving` holds.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from aiohttp import web

from seallmd import __version__
from seallmd.api.access import make_access, make_rate_headers
from seallmd.api.batch.routes import BatchRoutes
from seallmd.api.batch.runner import Endpoint, Runner
from seallmd.api.batch.store import Store
from seallmd.api.batch.teller import Teller
from seallmd.api.chat_answer import ChatAnswer
from seallmd.api.chats import prepare
from seallmd.api.completion_answer import CompletionAnswer
from seallmd.api.cors import make_cors, tell_origin
from seallmd.api.embeddings import Embeddings
from seallmd.api.guard import make_guard
from seallmd.api.keys import Keyring
from seallmd.api.limits import truncated
from seallmd.api.metrics import CONTENT_TYPE, Metrics
from seallmd.api.ollama import Ollama
from seallmd.api.openapi import document
from seallmd.api.problems import problems
from seallmd.api.prompts import split_prompts
from seallmd.api.responses import Answer
from seallmd.api.responses_answer import ResponsesAnswer
from seallmd.api.responses_schema import read_responses
from seallmd.api.schema import MAX_PROMPTS, ChatRequest, read_chat, read_completion
from seallmd.api.serving import Serving, json_response, read_body
from seallmd.api.settings import BatchSettings, HttpSettings
from seallmd.api.sockets import claim_socket_path
from seallmd.api.text import TextModel
from seallmd.api.tokenize import Tokenize
from seallmd.api.turns import TurnFormat
from seallmd.api.ui import PAGE_PATHS, Ui
from seallmd.api.wire import EVENTS, NAMED_EVENTS, Wire
from seallmd.core.status import NodeStatus, ServiceStatus
from seallmd.errors import ConfigError, ControlError, RequestError
from seallmd.runtime.face import EngineFace, ServiceView

BATCHES: web.AppKey[Runner] = web.AppKey("batches", Runner)
_SHUTDOWN_SECONDS = 10.0


def build_app(
    engine: EngineFace,
    settings: HttpSettings,
    keyring: Keyring | None = None,
    metrics: Metrics | None = None,
    store: Store | None = None,
) -> web.Application:
    """The application. keyring: whose callers it serves, None = everybody. metrics: where requests are
    counted. store: of files and batches, None = there are none; `app[BATCHES]` is to be started and closed.

    Its runner needs handler_cancellation, as `start_http` sets it: without that, a client that leaves before
    its first token is not noticed.
    """
    metrics = metrics or Metrics(engine.status)
    serving = Serving(engine, settings, metrics)
    openai, embeddings = OpenAI(serving), Embeddings(serving)
    origins, keyring = settings.cors_origins, keyring or Keyring()
    middlewares = [
        problems,
        make_guard(settings.host, origins),
        make_cors(origins),
        make_access(keyring, (*settings.open_paths, *PAGE_PATHS)),
    ]
    app = web.Application(middlewares=middlewares, client_max_size=settings.max_body_bytes)
    app.add_routes(Operation(serving).routes())
    app.add_routes(openai.routes())
    app.add_routes(embeddings.routes())
    app.add_routes(Tokenize(serving).routes())
    app.add_routes(Ollama(serving).routes())
    Ui(serving).register(app)
    store = store or Store(BatchSettings(), Path())
    endpoints = {**openai.endpoints(), **embeddings.endpoints()}
    app[BATCHES] = Runner(store, endpoints, serving.view, keyring, Teller(engine.feed, metrics))
    app.add_routes(BatchRoutes(store, app[BATCHES]).routes())

    async def describe(_request: web.Request) -> web.Response:
        return json_response(document(settings.open_paths, keys=keyring.required))

    app.router.add_get("/openapi.json", describe)

    async def close(_app: web.Application) -> None:
        await serving.close()

    app.on_cleanup.append(close)
    app.on_response_prepare.append(_tell_server)
    app.on_response_prepare.append(make_rate_headers(serving.rates))
    app.on_response_prepare.append(partial(tell_origin, origins))
    return app


async def _tell_server(_request: web.Request, response: web.StreamResponse) -> None:
    """The name alone: versions of what is below it are of use to nobody but attackers."""
    response.headers["Server"] = "seallmd"


async def start_http(
    engine: EngineFace,
    settings: HttpSettings,
    listeners: Sequence[socket.socket] = (),
    keyring: Keyring | None = None,
    metrics: Metrics | None = None,
    store: Store | None = None,
) -> web.AppRunner:
    """Listen where the settings say; `cleanup()` of the result ends it. Raises ConfigError.

    listeners: sockets that are open already (socket activation), instead of those of the settings; they stay
    in the file system. keyring, metrics, store: as in `build_app`.
    """
    tls = tls_context(settings)
    bound: list[Path] = []  # removed at the end, but only if they are ours
    app = build_app(engine, settings, keyring, metrics, store)

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
        for listener in listeners:
            await web.SockSite(
                runner, listener, ssl_context=None if listener.family == socket.AF_UNIX else tls
            ).start()
        if settings.host and not listeners:
            await web.TCPSite(runner, settings.host, settings.port, ssl_context=tls).start()
        if settings.socket and not listeners:
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


def tls_context(settings: HttpSettings) -> ssl.SSLContext | None:
    """What TCP speaks; None = plain HTTP. Raises ConfigError."""
    if not settings.tls_certificate and not settings.tls_key:
        return None
    if not settings.tls_certificate or not settings.tls_key:
        raise ConfigError("http: TLS needs both tls_certificate and tls_key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        raise ConfigError(f"http: {settings.tls_certificate} and {settings.tls_key}: {reason}") from error
    return context


def http_addresses(runner: web.AppRunner, *, tls: bool = False) -> tuple[str, ...]:
    """Where HTTP is served: "http://127.0.0.1:8000", "http://[::1]:8000", "unix:/run/seallmd/http.sock"."""
    return tuple(
        f"unix:{address}" if isinstance(address, str) else _url(address[0], address[1], tls=tls)
        for address in runner.addresses
    )


def _url(host: str, port: int, *, tls: bool) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Operation:
    """What monitoring asks. None of it wakes a model."""

    def __init__(self, serving: Serving) -> None:
        self._engine = serving.engine
        self._metrics = serving.metrics
        self._begun: set[str] = set()  # preloaded services that have been resident
        self._ready = False

    def routes(self) -> list[web.RouteDef]:
        """GET /health, /ready, /version, /metrics."""
        return [
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/version", self.version),
            web.get("/metrics", self.metrics),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        """200 when every device is up, else 503 with the reason."""
        devices = self._engine.status().devices
        down = [f"device {device.device} is {device.state}" for device in devices if device.state != "up"]
        if down or not devices:
            raise RequestError("; ".join(down) or "there is no device", status=503, code="unhealthy")
        return json_response({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.Response:
        """200 once every preloaded or pinned service has been resident; 503 before, and while draining.

        A preloaded service that makes room for another later on, or that a reload adds, is business as usual.
        """
        status = self._engine.status()
        if status.draining:
            raise RequestError("the server takes no new requests", status=503, code="draining")
        if not self._ready:
            self._look_at_preloaded(status)
        return json_response({"status": "ready"})

    def _look_at_preloaded(self, status: NodeStatus) -> None:
        """Raises RequestError while one of them has not come in yet."""
        states = {service.name: service for service in status.services}
        settings = [view.settings for view in self._engine.services()]
        preloaded = [service.name for service in settings if service.preload or service.pinned]
        self._begun |= {name for name in preloaded if _was_resident(states.get(name))}
        missing = [f"{name} is {states[name].state}" for name in preloaded if name not in self._begun]
        if missing:
            raise RequestError("; ".join(missing), status=503, code="not_ready", retry_after=1.0)
        self._ready = True

    async def version(self, _request: web.Request) -> web.Response:
        """The daemon's version."""
        return json_response({"version": __version__})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})


class OpenAI:
    """OpenAI's API."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def routes(self) -> list[web.RouteDef]:
        """Everything below /v1/."""
        return [
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name}", self.model),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/responses", self.responses),
        ]

    def endpoints(self) -> dict[str, Endpoint]:
        """Those that answer a body from anywhere: of the lines of batches, by path."""
        return {
            "/v1/chat/completions": self.converse,
            "/v1/completions": self.complete,
            "/v1/responses": self.respond,
        }

    async def models(self, _request: web.Request) -> web.Response:
        """Every configured service, served or not."""
        cards = [_card(view) for view in self._serving.views()]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: web.Request) -> web.Response:
        """One service."""
        return json_response(_card(self._serving.view(request.match_info["name"])))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self.complete(await read_body(request), request)

    async def complete(self, body: bytes, request: web.Request | None = None) -> web.StreamResponse:
        """The same for a body from anywhere. request: as for `Serving.generate`."""
        spec = read_completion(body)
        model = await self._serving.model(spec.model)
        special = spec.add_special_tokens is not False
        given = split_prompts(spec.prompt, "prompt", MAX_PROMPTS)
        encoded = [await self._serving.encode(model, prompt, add_special_tokens=special) for prompt in given]
        prompts = [truncated(spec, model.shape.context, prompt) for prompt in encoded]
        echoes = []
        for source, whole, prompt in zip(given, encoded, prompts, strict=True) if spec.echo else ():
            text = source if isinstance(source, str) and len(prompt) == len(whole) else None
            skip = spec.skip_special_tokens is not False
            echoes.append(await self._serving.texts.echo(model.text, prompt, text, skip_special=skip))
        answer = CompletionAnswer(spec, model.text.vocabulary, echoes)
        return await self._serving.generate(request, spec, model, prompts, answer)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self.converse(await read_body(request), request)

    async def converse(self, body: bytes, request: web.Request | None = None) -> web.StreamResponse:
        """The same for a body from anywhere."""
        spec = read_chat(body)
        return await self._chat(request, spec, lambda text, turn: ChatAnswer(spec, text.vocabulary, turn))

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/responses."""
        return await self.respond(await read_body(request), request)

    async def respond(self, body: bytes, request: web.Request | None = None) -> web.StreamResponse:
        """The same for a body from anywhere."""
        wanted = read_responses(body)
        return await self._chat(
            request, wanted.as_chat(), lambda _, turn: ResponsesAnswer(wanted, turn), NAMED_EVENTS
        )

    async def _chat(
        self,
        request: web.Request | None,
        spec: ChatRequest,
        answer: Callable[[TextModel, TurnFormat], Answer],
        wire: Wire = EVENTS,
    ) -> web.StreamResponse:
        """The next turn of a conversation. answer: words it, given how it is written."""
        chat = await prepare(self._serving, spec)
        worded = answer(chat.model.text, chat.turn.format)
        return await self._serving.generate(request, spec, chat.model, [chat.prompt], worded, wire, chat.turn)


def _was_resident(service: ServiceStatus | None) -> bool:
    return service is not None and (service.swaps_in > 0 or service.state == "resident")


def _card(view: ServiceView) -> dict[str, object]:
    """A model as OpenAI describes it; max_model_len is vLLM's name for the context limit."""
    card: dict[str, object] = {
        "id": view.settings.name,
        "object": "model",
        "created": view.created,
        "owned_by": "seallmd",
    }
    return card if view.shape is None else {**card, "max_model_len": view.shape.context}

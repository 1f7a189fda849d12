"""The HTTP side: its routes, on TCP and on a Unix socket.

Owns the application, where it listens, and the endpoints of OpenAI's API and of operation. Must not know how
the engine works (`EngineFace` is all it sees) nor how requests are generated, which `serving` holds.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from seallmd import __version__
from seallmd.api.guard import make_guard
from seallmd.api.metrics import CONTENT_TYPE
from seallmd.api.ollama import Ollama
from seallmd.api.problems import problems
from seallmd.api.responses import ChatAnswer, CompletionAnswer
from seallmd.api.schema import plain_messages, read_chat, read_completion, split_prompts
from seallmd.api.serving import Serving, json_response, read_body
from seallmd.api.settings import HttpSettings
from seallmd.api.sockets import claim_socket_path
from seallmd.api.tokenize import Tokenize
from seallmd.api.ui import Ui
from seallmd.core.status import ServiceStatus
from seallmd.errors import ConfigError, ControlError, RequestError
from seallmd.runtime.face import EngineFace, ServiceView

_SHUTDOWN_SECONDS = 10.0


def build_app(engine: EngineFace, settings: HttpSettings) -> web.Application:
    """The application. Its runner needs handler_cancellation, as `start_http` sets it: without that, a client
    that leaves before its first token is not noticed."""
    serving = Serving(engine, settings)
    middlewares = [problems, make_guard(settings.host)]
    app = web.Application(middlewares=middlewares, client_max_size=settings.max_body_bytes)
    app.add_routes(Operation(serving).routes())
    app.add_routes(OpenAI(serving).routes())
    app.add_routes(Tokenize(serving).routes())
    app.add_routes(Ollama(serving).routes())
    Ui(serving).register(app)

    async def close(_app: web.Application) -> None:
        await serving.close()

    app.on_cleanup.append(close)
    return app


async def start_http(
    engine: EngineFace, settings: HttpSettings, listeners: Sequence[socket.socket] = ()
) -> web.AppRunner:
    """Listen where the settings say; `cleanup()` of the result ends it. Raises ConfigError.

    listeners: sockets that are open already (socket activation), instead of those of the settings; they stay
    in the file system.
    """
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
        for listener in listeners:
            await web.SockSite(runner, listener).start()
        if settings.host and not listeners:
            await web.TCPSite(runner, settings.host, settings.port).start()
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


def http_addresses(runner: web.AppRunner) -> tuple[str, ...]:
    """Where HTTP is served: "http://127.0.0.1:8000", "http://[::1]:8000", "unix:/run/seallmd/http.sock"."""
    return tuple(
        f"unix:{address}" if isinstance(address, str) else _url(address[0], address[1])
        for address in runner.addresses
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Operation:
    """What monitoring asks. None of it wakes a model."""

    def __init__(self, serving: Serving) -> None:
        self._engine = serving.engine
        self._metrics = serving.metrics
        self._begun: set[str] = set()  # preloaded services that have been resident

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

        A preloaded service that makes room for another later on is business as usual.
        """
        status = self._engine.status()
        if status.draining:
            raise RequestError("the server is shutting down", status=503, code="shutting_down")
        states = {service.name: service for service in status.services}
        settings = [view.settings for view in self._engine.services()]
        preloaded = [service.name for service in settings if service.preload or service.pinned]
        self._begun |= {name for name in preloaded if _was_resident(states.get(name))}
        missing = [f"{name} is {states[name].state}" for name in preloaded if name not in self._begun]
        if missing:
            raise RequestError("; ".join(missing), status=503, code="not_ready", retry_after=1.0)
        return json_response({"status": "ready"})

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
        ]

    async def models(self, _request: web.Request) -> web.Response:
        """Every configured service, served or not."""
        cards = [_card(view) for view in self._serving.engine.services()]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: web.Request) -> web.Response:
        """One service."""
        return json_response(_card(self._serving.view(request.match_info["name"])))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        spec = read_completion(await read_body(request))
        model = await self._serving.model(spec.model)
        prompts = [await self._serving.encode(model, prompt) for prompt in split_prompts(spec.prompt)]
        answer = CompletionAnswer(spec.model, token_ids=bool(spec.return_token_ids))
        return await self._serving.generate(request, spec, model, prompts, answer)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        spec = read_chat(await read_body(request))
        model = await self._serving.model(spec.model)
        messages = plain_messages(spec.messages)
        prompt = await self._serving.texts.encode_chat(model.text, messages, spec.chat_template_kwargs or {})
        answer = ChatAnswer(spec.model, token_ids=bool(spec.return_token_ids))
        return await self._serving.generate(request, spec, model, [prompt], answer)


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

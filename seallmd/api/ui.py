"""The page at /ui: its files, what it shows, and what its buttons do.

Owns these routes and the shape of the feed. Must not know how the page looks (`seallmd.ui`) nor how
figures are gathered (`history`, `latency_window`).

    GET  /ui                      the page; its other files lie below
    GET  /ui/feed                 server-sent events: one at once, then one a second. boot, sample and
                                  happening in the query: what the reader has already
    POST /ui/services/NAME/VERB   load, evict, pin, unpin, drain or undrain; 200 once it is done
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Coroutine, Iterator
from importlib.resources import files
from itertools import groupby
from typing import Any

import msgspec
from aiohttp import web

from seallmd import __version__
from seallmd.api.history import Happening, History, Sample
from seallmd.api.latency_window import WINDOW_SECONDS, Figures, Targets
from seallmd.api.serving import Serving, json_response
from seallmd.api.ui_access import require_operator, why_not_operator
from seallmd.core.events import PinWanted, ServiceDrainWanted
from seallmd.core.status import ArenaMap, DeviceStatus, Holding, NodeStatus, ServiceStatus
from seallmd.errors import ControlError, RequestError
from seallmd.runtime.face import EngineFace

MOST_CELLS = 2048  # of an arena's map: more than a screen shows
MOST_FEEDS = 64
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FEED_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # or nginx collects the stream
}

Verb = Callable[[EngineFace, str], Coroutine[Any, Any, None]]
# The page has a button for each of these that it knows how to draw.
VERBS: dict[str, Verb] = {
    "load": lambda engine, service: engine.load(service),
    "evict": lambda engine, service: engine.evict(service, now=False),
    "pin": lambda engine, service: engine.operate(lambda ticket: PinWanted(ticket, service)),
    "unpin": lambda engine, service: engine.operate(lambda ticket: PinWanted(ticket, service, pinned=False)),
    "drain": lambda engine, service: engine.operate(lambda ticket: ServiceDrainWanted(ticket, service)),
    "undrain": lambda engine, service: engine.operate(
        lambda ticket: ServiceDrainWanted(ticket, service, drained=False)
    ),
}


class DeviceView(msgspec.Struct, frozen=True):
    """A device as the page draws it.

    cells: the arena's map as runs (kind, service, cells), in order. cell_count: of all runs. blocks: of the
    arena; 0 while there is none. claim: the service that free memory is kept for.
    """

    status: DeviceStatus
    blocks: int
    cell_count: int
    cells: list[tuple[str, str, int]]
    holdings: tuple[Holding, ...]
    claim: str


class ServiceCard(msgspec.Struct, frozen=True):
    """A service as the page draws it. figures: of the window; None when nothing was asked of it."""

    status: ServiceStatus
    figures: Figures | None


class Frame(msgspec.Struct, frozen=True):
    """One event of the feed: all of now, and of the past what the reader does not have.

    boot: of this daemon's life; the numbers of samples and happenings count within one. verbs: what the
    reader may do; denied: why not more, empty when it may all.
    """

    boot: str
    version: str
    policy: str
    draining: bool
    block_bytes: int
    window_seconds: int
    targets: Targets
    verbs: tuple[str, ...]
    denied: str
    devices: list[DeviceView]
    services: list[ServiceCard]
    samples: list[Sample]
    happenings: list[Happening]


class Ui:
    """The page's routes."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._engine = serving.engine
        self.history = History(serving.engine.status, serving.metrics.window)
        self._boot = secrets.token_hex(8)
        self._feeds: set[asyncio.Transport] = set()  # connections that one is sent on
        self._assets = dict(_read_assets())
        self._drawn = 0, list[DeviceView]()  # for which sample; all pages share it

    def register(self, app: web.Application) -> None:
        """Add the routes, and take samples for as long as the application runs."""
        app.router.add_get("/ui", self.page)
        app.router.add_get("/ui/", self.page)
        app.router.add_get("/ui/feed", self.feed)
        app.router.add_get("/ui/{name}", self.asset)
        app.router.add_post("/ui/services/{name}/{verb}", self.operate)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop)

    async def _start(self, _app: web.Application) -> None:
        self.history.start()

    async def _stop(self, _app: web.Application) -> None:
        """A feed has no end of its own: without this, stopping would wait for every open page."""
        await self.history.stop()
        for transport in tuple(self._feeds):
            transport.close()

    # --------------------------------------------------------------------------------- files

    async def page(self, request: web.Request) -> web.Response:
        """The page itself."""
        return self._send(request, "index.html")

    async def asset(self, request: web.Request) -> web.Response:
        """One of its files."""
        return self._send(request, request.match_info["name"])

    def _send(self, request: web.Request, name: str) -> web.Response:
        """A file, or 304: browsers keep it and ask whether it has changed."""
        asset = self._assets.get(name)
        if asset is None:
            raise web.HTTPNotFound
        body, content_type, tag = asset
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": f'"{tag}"'}
        if tag in {etag.value for etag in request.if_none_match or ()}:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers={**headers, "Content-Type": content_type})

    # --------------------------------------------------------------------------------- feed

    async def feed(self, request: web.Request) -> web.StreamResponse:
        """What the page shows, as long as it is open. A slow reader gets fewer frames, none incomplete."""
        if len(self._feeds) >= MOST_FEEDS:
            message = "too many pages are open"
            raise RequestError(message, status=503, code="too_many_feeds", retry_after=10.0)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the page was closed")
        self._feeds.add(transport)
        response = web.StreamResponse(headers={**FEED_HEADERS, **SECURITY_HEADERS})
        try:
            sample, happening = self._position(request)
            with contextlib.suppress(ConnectionError):  # the page was closed
                await response.prepare(request)
                while True:
                    await self.history.newer(sample)
                    frame = self._frame(request, sample, happening)
                    sample = self.history.latest
                    happening = frame.happenings[-1].number if frame.happenings else happening
                    await response.write(b"data: " + msgspec.json.encode(frame) + b"\n\n")
        finally:
            self._feeds.discard(transport)
        return response

    def _position(self, request: web.Request) -> tuple[int, int]:
        """Numbers of the last sample and happening that the page has; none that another daemon sent."""
        if request.query.get("boot") != self._boot:
            return 0, 0
        try:
            sample, happening = (int(request.query.get(name, "0")) for name in ("sample", "happening"))
        except ValueError:
            raise RequestError("sample and happening are whole numbers") from None
        return min(sample, self.history.latest), happening

    def _frame(self, request: web.Request, sample: int, happening: int) -> Frame:
        status = self._engine.status()
        figures = self._serving.metrics.window.by_service()
        denied = why_not_operator(request)
        return Frame(
            boot=self._boot,
            version=__version__,
            policy=status.policy,
            draining=status.draining,
            block_bytes=status.block_bytes,
            window_seconds=WINDOW_SECONDS,
            targets=self._serving.metrics.window.targets,
            verbs=() if denied else tuple(VERBS),
            denied=denied,
            devices=self._devices(status),
            services=[ServiceCard(service, figures.get(service.name)) for service in status.services],
            samples=self.history.samples(sample),
            happenings=self.history.happenings(happening),
        )

    def _devices(self, status: NodeStatus) -> list[DeviceView]:
        if self._drawn[0] != self.history.latest:
            views = _device_views(status, self._engine.arena_maps(MOST_CELLS))
            self._drawn = self.history.latest, views
        return self._drawn[1]

    # --------------------------------------------------------------------------------- buttons

    async def operate(self, request: web.Request) -> web.Response:
        """Do what a button says, and answer when it is done; when the page leaves, it goes on."""
        require_operator(request)
        name, verb = request.match_info["name"], request.match_info["verb"]
        view = self._serving.view(name)
        if verb not in VERBS:
            raise RequestError(f"there is no verb {verb[:32]!r}", status=404, code="unknown_verb")
        if verb == "evict" and view.settings.pinned:
            message = f"{name} is pinned; seallmctl evict takes it out all the same"
            raise RequestError(message, status=403, code="model_pinned")
        try:
            await VERBS[verb](self._engine, name)
        except ControlError as error:
            raise RequestError(str(error), status=409, code="not_done") from error
        return json_response({"done": verb, "service": name})


def _device_views(status: NodeStatus, maps: list[ArenaMap]) -> list[DeviceView]:
    by_device = {map_.device: map_ for map_ in maps}
    views = []
    for device in status.devices:
        map_ = by_device.get(device.device, ArenaMap(device.device, 0, ()))
        runs = [(cell.kind, cell.service, len(list(same))) for cell, same in groupby(map_.cells)]
        views.append(DeviceView(device, map_.blocks, len(map_.cells), runs, map_.holdings, map_.claim))
    return views


def _read_assets() -> Iterator[tuple[str, tuple[bytes, str, str]]]:
    """Everything that browsers may have: name to body, type and tag. Nothing is read from disk later on."""
    for file in files("seallmd.ui").iterdir():
        content_type = _TYPES.get(file.name.rpartition(".")[2])
        if content_type is not None:
            body = file.read_bytes()
            yield file.name, (body, content_type, hashlib.sha256(body).hexdigest()[:16])


# Nothing in them is anybody's own, and browsers send no API key for them.
PAGE_PATHS = ("/ui", "/ui/", *(f"/ui/{name}" for name, _ in _read_assets()))

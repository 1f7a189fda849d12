"""The running system: one event loop that feeds the node and carries its actions out.

Owns the node, the child processes, the streams of requests and the tickets of operators. Decides nothing
about services, requests or memory: whatever happens becomes an event, whatever is done was an action.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.arena_map import arena_maps
from seallmd.core.node import Node
from seallmd.core.placement import place
from seallmd.core.report import request_statuses, service_detail
from seallmd.core.service import Service
from seallmd.core.settings import (
    GroupSettings,
    NodeSettings,
    PolicySettings,
    ReplacementSettings,
    ServiceSettings,
)
from seallmd.core.status import ArenaMap, NodeStatus, PlanStatus, RequestStatus, ServiceDetail
from seallmd.errors import ControlError, RequestError
from seallmd.runtime import profiles, rendezvous
from seallmd.runtime.children import Child
from seallmd.runtime.devices import DevicePlan
from seallmd.runtime.face import Generation, ServiceView, TokenStream
from seallmd.runtime.feed import EventFeed
from seallmd.runtime.forkserver import ForkServer
from seallmd.runtime.host_memory import HostMemory
from seallmd.runtime.journal import FlightRecorder, Journal
from seallmd.runtime.log import RequestRecord
from seallmd.runtime.supervised import Supervised

log = logging.getLogger(__name__)

LOOK_SECONDS = (0.25, 5.0)  # how often children are looked at: a quarter of their limit, within these bounds
PROFILES = "profiles.json"  # in the cache directory
FLIGHTS = "flight"  # there too: dumps of the flight recorder


class Engine:
    """Implements `face.EngineFace`. Everything runs on the event loop that called `start`."""

    def __init__(
        self,
        settings: NodeSettings,
        plan: DevicePlan,
        forkserver: ForkServer,
        journal: Journal | None = None,
        hung_seconds: float = 120.0,
        restart_seconds: float = 30.0,
        flight_bytes: int = 0,
    ) -> None:
        """forkserver: where children come from; it ends with them. hung_seconds: how long a child may be
        silent while it owes an answer. restart_seconds: the longest pause before a dead child is started
        again. flight_bytes: memory for the last minutes' events."""
        self.node = Node(settings)
        self.feed = EventFeed()
        self._flight = FlightRecorder(self.node, flight_bytes) if flight_bytes else None
        self._settings = settings
        self._plan = plan
        self._forkserver = forkserver
        self._journal = journal
        self._created = int(time.time())
        self._epoch = time.monotonic()
        self._streams: dict[int, TokenStream] = {}
        self._records: dict[int, RequestRecord] = {}
        self._tickets: dict[int, asyncio.Future[str]] = {}
        self._requests = 0
        self._ticket_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._search: asyncio.Task[None] | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._hung_seconds = hung_seconds
        self._restart_seconds = restart_seconds
        self._stopping = False
        self._quiet = asyncio.Event()
        self._host_memory = HostMemory(len(plan.workers), plan.host_kv_bytes)
        self._workers = [
            Supervised(
                partial(Child, forkserver, "worker", settings, msg.FromWorker),
                up=partial(self._worker_up, index),
                lost=partial(self._worker_lost, index),
                said=partial(self._worker_said, index),
            )
            for index, settings in enumerate(self._worker_settings())
        ]
        self._host = Supervised(
            partial(Child, forkserver, "host", plan.host, msg.FromHost),
            up=lambda _: self._happen(ev.HostUp()),
            lost=lambda reason: self._happen(ev.HostLost(reason)),
            said=lambda message: self._happen(ev.FromHostProcess(message)),  # type: ignore[arg-type]
        )

    def _worker_settings(self) -> list[msg.WorkerSettings]:
        """What each worker is started with: all know where each other's host memory is."""
        paths = self._host_memory.paths
        return [
            msgspec.structs.replace(settings, index=index, host_kv=paths)
            for index, settings in enumerate(self._plan.workers)
        ]

    # --------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Start every child; returns before they are ready."""
        self.set_hung_seconds(self._hung_seconds)
        for child in self._children:
            child.longest_pause = self._restart_seconds
        try:
            rendezvous.make(self._plan.rendezvous)
        except OSError as error:  # a full disk, say: all else does without it
            log.error("there is no place where groups of devices could meet: %s", error.strerror)
        for child in self._children:
            await child.start()
        self._look()

    @property
    def _children(self) -> tuple[Supervised, ...]:
        return (self._host, *self._workers)

    def set_hung_seconds(self, seconds: float) -> None:
        """Change how long a child may be silent while it owes an answer."""
        self._hung_seconds = seconds
        for child in self._children:
            child.pulse.limit_seconds = seconds

    def _look(self) -> None:
        """Kill what hangs; its end is then like any other."""
        for child in self._children:
            child.look()
        pause = min(max(self._hung_seconds / 4, LOOK_SECONDS[0]), LOOK_SECONDS[1])
        self._looking = asyncio.get_running_loop().call_later(pause, self._look)

    @property
    def stuck(self) -> bool:
        """Whether a child hangs that not even a kill ends (a device driver holds it): only the machine or
        a restart of everything can help."""
        return any(child.stuck for child in self._children)

    @property
    def in_flight(self) -> int:
        """How many requests are not over."""
        return len(self._streams)

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let those in flight end for `drain_seconds`, then end everything."""
        self._happen(ev.DrainWanted())
        try:
            if self._streams:
                log.info("waiting for %d requests", len(self._streams))
                self._quiet.clear()
                await asyncio.wait_for(self._quiet.wait(), drain_seconds)
        except TimeoutError:
            log.warning("%d requests did not end in time", len(self._streams))
            self._happen(ev.DrainWanted(now=True))
        self._stopping = True
        for timer in (self._timer, self._looking, self._search):
            if timer is not None:
                timer.cancel()
        await asyncio.gather(*(child.stop() for child in self._children))
        self._forkserver.close()
        self._host_memory.close()
        rendezvous.remove(self._plan.rendezvous)
        if self._journal is not None:
            self._journal.close()
        path = self._plan.cache / PROFILES
        profiles.save(path, self.node.state.settings.services, self._plan.roofline.name, self.node.profiles())

    # --------------------------------------------------------------------------------- the loop

    def _now(self) -> float:
        return time.monotonic() - self._epoch

    def _happen(self, event: ev.Event) -> None:
        """One turn: an event in, its actions out."""
        if self._stopping:
            return
        now = self._now()
        try:
            actions = self.node.handle(event, now)
        except Exception:
            self._end_at_once(event, now)
            raise
        for recorder in (self._journal, self._flight):
            if recorder is not None:
                recorder.record(now, event, actions)
        for action in actions:
            self._carry_out(action)
        self._schedule_tick()

    def _end_at_once(self, event: ev.Event, now: float) -> None:
        """An invariant broke: serving on would lose or mix up memory. Children die with this process."""
        log.critical("the node failed on a %s; ending", type(event).__name__, exc_info=True)
        if self._journal is not None:
            self._journal.record(now, event, [])
            self._journal.close()
        if self._flight is not None:
            self._flight.failed(now, event)
        self.dump_flight()
        os._exit(1)

    def broken_invariant(self) -> str:
        """The first invariant that does not hold; empty when all do."""
        try:
            self.node.check()
        except AssertionError as error:
            return str(error) or "an invariant without a name"
        return ""

    def dump_flight(self) -> Path | None:
        """Write the last minutes to a file, for tools/replay.py. None when there is nothing to write, or no
        place for it; the log says so."""
        if self._flight is None:
            return None
        try:
            path = self._flight.dump(self._plan.cache / FLIGHTS)
        except OSError as error:
            log.error("the flight recorder cannot be written: %s", error.strerror)
            return None
        log.info("flight recorder written, for tools/replay.py: %s", path)
        return path

    def _carry_out(self, action: ev.Action) -> None:
        match action:
            case ev.ToDevice(device, message, expects):
                self._workers[device].send(message, expects)
            case ev.Emit(request, tokens, cached):
                stream = self._streams[request]
                stream.cached = cached or stream.cached
                stream.push(tokens)
                self._records[request].emitted(len(tokens), cached, self._now())
            case ev.Scored(request, scores):
                self._streams[request].score(scores)
            case ev.Embedded(request, pooled):
                self._streams[request].pool(pooled)
            case ev.Finish(request):
                self._streams.pop(request).end(action)
                record = self._records.pop(request)
                record.finished(action, self._now())
                self.feed.tell("request", record.service, record.summary(action, self._now()))
                if not self._streams:
                    self._quiet.set()
            case ev.ToHostProcess(message):
                self._host.send(message)
            case ev.Answer(ticket, error):
                self._tickets.pop(ticket).set_result(error)
            case ev.SearchPlan():
                self._search = asyncio.create_task(self._search_plan(action))
            case ev.Note(service, text):
                log.info("%s%s", f"{service}: " if service else "", text)
                self.feed.tell("service", service, text)

    async def _search_plan(self, wanted: ev.SearchPlan) -> None:
        """Beside the loop: up to a second of computing."""
        self._happen(
            ev.PlanFound(await asyncio.to_thread(place, wanted.demands, wanted.machine, wanted.near))
        )

    def _schedule_tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self.node.next_wakeup()
        if at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, at - self._now()), self._happen, ev.Tick())

    # --------------------------------------------------------------------------------- children

    def _worker_up(self, index: int, hello: msg.Hello) -> None:
        self._happen(ev.WorkerUp(index, hello.device, hello.arena_bytes, hello.pid))

    def _worker_lost(self, index: int, reason: str) -> None:
        self._happen(ev.WorkerLost(index, reason))

    def _worker_said(self, index: int, message: msg.Message) -> None:
        self._happen(ev.FromDevice(index, message))  # type: ignore[arg-type]

    # --------------------------------------------------------------------------------- the face

    def services(self) -> list[ServiceView]:
        """Every configured service, in the order of the configuration."""
        services = self.node.state.services.values()
        return [self._view(service) for service in services if not _has_left(service)]

    def service(self, name: str) -> ServiceView | None:
        """One service by name."""
        service = self.node.state.services.get(name)
        return None if service is None or _has_left(service) else self._view(service)

    def _view(self, service: Service) -> ServiceView:
        shape = service.shape
        if shape is not None:
            shape = msgspec.structs.replace(shape, context=self.node.context_limit(service.name))
        directory = service.directory or None
        return ServiceView(service.settings, self._created, directory, shape, service.refused)

    def submit(self, generations: list[Generation]) -> list[TokenStream]:
        """Start requests that share one prompt. A refusal is the stream's end."""
        if self._stopping:
            raise RequestError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
        streams = []
        leader = 0
        for generation in generations:
            self._requests += 1
            stream = TokenStream(self._requests)
            self._streams[stream.request] = stream
            self._records[stream.request] = RequestRecord(
                *(stream.request, generation.service, len(generation.prompt)),
                *(self._now(), generation.tier),
            )
            streams.append(stream)
            self._happen(
                ev.Arrived(
                    stream.request,
                    generation.service,
                    generation.prompt,
                    generation.max_tokens,
                    generation.sampling,
                    generation.stop_ids,
                    generation.salt,
                    leader,
                    generation.tier,
                )
            )
            leader = leader or stream.request
        return streams

    def cancel(self, request: int) -> None:
        """The client is gone or has enough. Unknown and finished requests are ignored."""
        if request in self._streams:
            self._happen(ev.Cancelled(request))

    def status(self) -> NodeStatus:
        """The report of this moment."""
        return self.node.status(self._now())

    def detail(self, service: str) -> ServiceDetail | None:
        """All that is known of one service; None when there is no such service."""
        for status in self.status().services:
            if status.name == service:
                return service_detail(self.node.state, status, self._now())
        return None

    def arena_maps(self, cells: int) -> list[ArenaMap]:
        """Who holds which part of each device's arena, in at most so many cells."""
        return arena_maps(self.node.state, cells)

    def plan(self) -> PlanStatus | None:
        """The plan in force and the best one known; None while nothing is planned."""
        return self.node.plan_status(self._now())

    def requests(self) -> list[RequestStatus]:
        """Every request that is not over, the most senior first."""
        return request_statuses(self.node.state, self._now())

    async def load(self, service: str, devices: tuple[int, ...] = ()) -> None:
        """Bring a service in, to named devices if any; returns when it is resident.

        Raises ControlError with the reason.
        """
        await self.operate(lambda ticket: ev.LoadWanted(ticket, service, devices))

    async def evict(self, service: str, now: bool) -> None:
        """Take a service out; returns when its memory is free. Raises ControlError with the reason."""
        await self.operate(lambda ticket: ev.EvictWanted(ticket, service, now))

    def hurry(self, service: str) -> None:
        """Somebody asks for a service that has not been examined: it goes before others."""
        self._happen(ev.ExaminationWanted(service))

    def keep(self, service: str, seconds: float) -> None:
        """Have a service stay for so long after its last request; 0 = for good."""
        self._happen(ev.KeepWanted(service, seconds))

    def reconfigure(
        self,
        services: tuple[ServiceSettings, ...],
        groups: tuple[GroupSettings, ...],
        policy: PolicySettings,
        replacement: ReplacementSettings,
    ) -> None:
        """From here on these settings hold; who is being served is not cut off."""
        now = self.node.state.settings
        event = ev.Reconfigured(services, groups, policy, replacement)
        if event != ev.Reconfigured(now.services, now.groups, now.policy, now.replacement):
            self._happen(event)

    async def operate(self, make: Callable[[int], ev.OperatorEvent]) -> None:
        """Carry out what an operator asks for; returns when it is done. Raises ControlError."""
        self._ticket_count += 1
        ticket = self._ticket_count
        answer = self._tickets[ticket] = asyncio.get_running_loop().create_future()
        event = make(ticket)
        self.feed.tell("operator", getattr(event, "service", ""), _in_words(event))
        self._happen(event)
        # Whoever waits may leave; the command goes on.
        if error := await asyncio.shield(answer):
            raise ControlError(error)


def _has_left(service: Service) -> bool:
    """Whether it is there only to end what it has begun, and nothing will take its name."""
    return service.outgoing and service.successor is None


def _in_words(event: ev.OperatorEvent) -> str:
    """What an operator asked for: "pin", "undrain device 0"."""
    match event:
        case ev.LoadWanted():
            return "load"
        case ev.EvictWanted():
            return "evict now" if event.now else "evict"
        case ev.PinWanted():
            return "pin" if event.pinned else "unpin"
        case ev.KeepWanted():
            return f"keep for {event.seconds:g} s"
    verb = "drain" if event.drained else "undrain"
    match event:
        case ev.DeviceDrainWanted():
            return f"{verb} device {event.device}"
        case ev.NodeDrainWanted():
            return f"{verb} everything"
    return verb

"""The node: the only place where decisions are made.

Owns the one entry, `Node.handle(event, now) -> actions`, and the meaning of each event; `residency`,
`dispatch` and the other parts decide the rest on the same state. Must not read a clock, do IO or draw random
numbers: the same (now, event) list gives the same actions, in the daemon, in the simulator and in a replay.
"""

from __future__ import annotations

from copy import deepcopy
from math import inf
from typing import TypeGuard

from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.admission import Door
from seallmd.core.arena import Arena
from seallmd.core.cost import StepCosts
from seallmd.core.dispatch import Dispatch
from seallmd.core.estimate import queue_guess
from seallmd.core.examination import Examination
from seallmd.core.host_kv import HostKv
from seallmd.core.idle import IdleLimits
from seallmd.core.images import Images
from seallmd.core.invariants import check_node
from seallmd.core.loads import Loads
from seallmd.core.migration import Migration
from seallmd.core.operators import Operators
from seallmd.core.outgrown import Outgrown
from seallmd.core.places import Places
from seallmd.core.planner import Planner
from seallmd.core.profile import ServiceProfile
from seallmd.core.reconfigure import Reconfigure
from seallmd.core.recovery import Recovery
from seallmd.core.report import node_status
from seallmd.core.request import Life, Request
from seallmd.core.residency import Residency
from seallmd.core.room import Room
from seallmd.core.scaling import Scaling
from seallmd.core.scheduler import charge
from seallmd.core.service import Image, Replica, Service, Stage
from seallmd.core.settings import NodeSettings
from seallmd.core.sharing import Sharing
from seallmd.core.state import Device, NodeState, SentStep
from seallmd.core.status import NodeStatus, PlanStatus
from seallmd.core.tiers import seniority
from seallmd.core.wakeup import Part, soonest

_RUNNING, _DONE = Life.RUNNING, Life.DONE  # asked for with every row, and slow to look up in their Enum


class Node:
    """All services on all devices of one machine, as far as decisions go."""

    def __init__(self, settings: NodeSettings) -> None:
        self._state = NodeState(
            settings,
            devices={index: Device(index) for index in range(settings.devices)},
            services={s.name: Service(s, wanted=s.preload or s.pinned) for s in settings.services},
            host_kv=HostKv.of(range(settings.devices), settings.host_kv_bytes // settings.block_bytes),
            sharing=Sharing(settings.groups),
        )
        self._places = Places(self._state)
        self._room = Room(self._state)
        self._images = Images(self._state)
        self._loads = Loads(self._state, self._room)
        self._residency = Residency(self._state, self._places, self._room, self._images, self._loads)
        self._scaling = Scaling(self._state, self._places, self._residency, self._images)
        self._migration = Migration(self._state)
        self._recovery = Recovery(self._state, self._places, self._room, self._loads)
        self._planner = Planner(self._state, self._places, self._room, self._residency, self._images)
        self._operators = Operators(self._state, self._places, self._room, self._planner)
        self._reconfigure = Reconfigure(self._state, self._room, self._images)
        self._examination = Examination(self._state)
        self._outgrown = Outgrown(self._state, self._places, self._room)
        self._door = Door(self._state, self._places)
        self._idle = IdleLimits(self._state, self._room)
        # In the order in which they settle, before steps are sent.
        self._parts: tuple[Part, ...] = (
            *(self._room, self._recovery, self._reconfigure, self._idle, self._outgrown),
            *(self._residency, self._scaling, self._migration, self._planner),
            self._examination,  # last: weights that are to be read go before another model's examination
        )
        self._calm_until, self._wakeup = -inf, inf
        self._dispatch = Dispatch(self._state, self._room)

    @property
    def state(self) -> NodeState:
        """What the node knows; for reports and checks, not to be changed."""
        return self._state

    def handle(self, event: ev.Event, now: float) -> list[ev.Action]:
        """Take in what happened at `now` (seconds, never falling) and say what is to be done, in order."""
        state = self._state
        if now > state.now:
            state.now = now
        state.actions = []
        moves = state.moves
        self._on(event)
        devices = self._touched(event)
        if _is_step_done(event) and self._is_calm(moves):
            self._dispatch.fill(devices)
            if self._is_calm(moves):
                return state.actions
            devices = list(state.devices.values())
        self._settle_all(devices)
        self._look_ahead()
        return state.actions

    def _is_calm(self, moves: int) -> bool:
        """Whether a step that ended concerns its devices alone. moves: how many there had been before it."""
        state = self._state
        return state.moves == moves and state.now < self._calm_until and not state.stranded

    def _look_ahead(self) -> None:
        """Note when a Tick is wanted, and until when the node is calm."""
        wakeups = (
            self._room.next_wakeup(),
            self._residency.next_wakeup(),
            self._scaling.next_wakeup(),
            self._planner.next_wakeup(),
            self._idle.next_wakeup(),
            self._recovery.next_wakeup(),
        )
        self._wakeup = soonest(wakeups, self._state.now)
        self._calm_until = min(
            [self._wakeup, self._operators.calm_until, *[p.calm_until for p in self._parts]]
        )

    def _touched(self, event: ev.Event) -> list[Device]:
        """Devices on which the event may let a step begin; there are many, and most events concern few.

        A step that is done, or a request that arrives, matters to the services of its device, wherever these
        have replicas: what they share of their requests, and whom their claims keep waiting.
        """
        state = self._state
        if _is_step_done(event):
            return state.beside(event.device)
        if type(event) is ev.Arrived and event.service in state.services:
            return state.devices_of(state.services[event.service].replicas)
        return list(state.devices.values())

    def _settle_all(self, devices: list[Device]) -> None:
        """Settle until nothing moves, and once more when services were found stranded last of all.

        That moves nothing, and no other event may come. Only once for each: it may have to wait for one.
        """
        seen: set[str] = set()
        while self._settle(devices) or not self._state.stranded <= seen:
            seen |= self._state.stranded
            devices = list(self._state.devices.values())

    def _settle(self, devices: list[Device]) -> bool:
        """Move services and send steps on some devices. True when things moved: look at all of them."""
        moves = self._state.moves
        for part in self._parts:
            part.settle()
        self._dispatch.fill(devices)
        self._room.settle()
        self._operators.settle()
        return moves != self._state.moves

    def next_wakeup(self) -> float | None:
        """When the node wants a Tick although nothing happens; None: only when something does."""
        return None if self._wakeup == inf else self._wakeup

    def profiles(self) -> dict[str, ServiceProfile]:
        """What was learnt of each service, for a later run's `NodeSettings.profiles`."""
        found = {}
        for service in self._state.services.values():
            if service.profile is not None and not service.outgoing:
                rate = service.arrivals.value(self._state.now)
                found[service.name] = replace(service.profile, requests_per_second=rate)
        return found

    def context_limit(self, name: str) -> int:
        """Most tokens, prompt and output, that a request of a probed service may have."""
        return self._places.context_limit(self._state.services[name])

    # ------------------------------------------------------------------------------------ events

    def _on(self, event: ev.Event) -> None:
        match event:
            case ev.FromDevice():
                self._on_device(self._state.devices[event.device], event.message)
            case ev.Arrived():
                self._on_arrived(event)
            case ev.Cancelled(request):
                if request in self._state.requests:
                    self._state.finish(self._state.requests[request], "cancelled")
            case ev.FromHostProcess(message):
                self._on_host(message)
            case ev.WorkerUp():
                self._on_worker_up(event)
            case ev.WorkerLost(device, reason):
                self._recovery.worker_lost(device, reason)
            case ev.HostUp():
                self._state.host_up = True
            case ev.ExaminationWanted(service):
                if service in self._state.services:
                    self._state.services[service].hurried = True
            case ev.HostLost(reason):
                self._recovery.host_lost(reason)
            case ev.DrainWanted(now):
                self._operators.stop(now=now)
            case ev.PlanFound(plan):
                self._planner.found(plan)
            case ev.Reconfigured():
                self._on_reconfigured(event)
            case ev.Tick():
                pass
            case _:
                self._operators.handle(event)
                self._idle.changed()

    def _on_arrived(self, event: ev.Arrived) -> None:
        refusal = self._door.refusal(event)
        if refusal is not None:
            self._state.actions.append(refusal)
            return
        state = self._state
        assert event.request not in state.requests, f"request {event.request} arrived twice"
        assert bool(event.sampling.pooling) == (event.max_tokens == 0), "pooled, or something is drawn"
        service = state.services[event.service]
        state.orders += 1
        request = Request(
            id=event.request,
            service=event.service,
            order=seniority(event.tier, state.orders),
            arrived=state.now,
            tokens=list(event.prompt),
            prompt=len(event.prompt),
            max_tokens=event.max_tokens,
            sampling=event.sampling,
            stop_ids=frozenset(event.stop_ids),
            root=(event.service, event.salt),
            leader=event.leader,
            tier=event.tier,
            told=0 if event.sampling.pooling else 1,
        )
        assert service.profile is not None
        request.expected_wait = queue_guess(state, service)
        request.budget = service.profile.request_seconds(request.prompt, draws=not request.pools)
        if not request.deferred:  # plans are made for those whose latency counts
            service.arrivals.add(1, state.now)
        service.evicted = False
        service.resume(state.now)
        state.requests[request.id] = request
        service.enqueue(request)
        service.prompt_tokens += request.prompt

    def _on_reconfigured(self, event: ev.Reconfigured) -> None:
        before = self._state.settings.policy.scheduler
        self._reconfigure.apply(event)
        self._planner.forget()
        self._idle.changed()
        self._operators.fail_misfits()
        if event.policy.scheduler != before:
            self._dispatch = Dispatch(self._state, self._room)

    # ------------------------------------------------------------------------------------ workers

    def _on_worker_up(self, event: ev.WorkerUp) -> None:
        device = self._state.devices[event.device]
        assert device.arena is None, f"device {event.device} came up twice"
        device.label, device.pid, device.state, device.steps = event.label, event.pid, "up", 0
        device.arena_bytes = event.arena_bytes
        settings = self._state.settings
        device.arena = Arena(event.arena_bytes // settings.block_bytes)
        self._recovery.worker_up(event.device)
        self._residency.look_at_sizes()

    def _on_device(self, device: Device, message: object) -> None:
        match message:
            case msg.StepDone():
                sent = device.inflight.pop(message.step)
                device.steps += 1
                if sent.leader == device.index:  # the other ranks have nothing to tell
                    if message.scores or message.pooled or message.failed:
                        self._state.tell(message, sent)
                    self._on_step_done(sent, message.tokens, message.seconds)
            case msg.BlocksCopied(copy):
                self._state.blocks_copied(device.index, copy)
            case msg.StepFailed(step, reason, memory):
                self._recovery.step_failed(device, device.inflight.pop(step), reason, memory=memory)
            case msg.CopyDone(name, _, copy, operations):
                if replica := self._awaited(device, name, copy):
                    replica.operations = operations
                    self._loads.copied(replica, device)
            case msg.CopyFailed(name, reason, copy):
                if replica := self._awaited(device, name, copy):
                    self._loads.copy_failed(replica, reason)
            case msg.JobProgress(name, stage, done, total):
                # One may serve before all of it has been copied, or have been evicted meanwhile.
                replica = device.replicas.get(name)
                if replica is not None and replica.stage is Stage.COPYING:
                    self._on_progress(name, (stage, done, total))

    def _on_progress(self, name: str, progress: tuple[str, int, int] | None) -> None:
        if name in self._state.services:  # else it has left the configuration meanwhile
            self._state.services[name].progress = progress

    def _awaited(self, device: Device, name: str, copy: int) -> Replica | None:
        """The replica that a copy is for; None when it was evicted before its copy heard of that."""
        replica = device.replicas.get(name)
        return replica if replica is not None and replica.copy == copy else None

    def _on_step_done(self, step: SentStep, tokens: tuple[int, ...], seconds: float) -> None:
        service = self._state.services[step.service]
        profile = service.profile
        assert profile is not None
        self._recovery.stepped(service)
        if not step.incomplete:
            profile.stepped(step.tokens, step.drawing, step.context, seconds * step.speedup)
        price, generated = profile.token_seconds(), 0
        drawn = iter(tokens)
        for row in step.rows:
            request, token = row.request, next(drawn) if row.sample else None
            life = request.life
            if life is _DONE:
                continue
            request.inflight -= 1
            if row.epoch < request.trusted:
                request.drawn -= row.sample
                token = None
            if token is not None:
                request.tokens.append(token)
                service.waiting_tokens += life is not _RUNNING and not request.deferred
            if row.epoch == request.epoch and life is _RUNNING:
                request.computed += row.count
                if (request.indexed + 1) * service.run_tokens <= request.computed:
                    self._index_blocks(request, service)
            if token is not None:
                generated += 1
                if self._on_token(request, service, token, price):
                    price = profile.token_seconds()  # which depends on how long answers are
            elif request.is_pooled:
                self._on_pooled(request, service)
        assert next(drawn, None) is None, f"step {step.id} drew more tokens than it was asked for"
        service.changed()
        if generated:
            service.rate.add(generated, self._state.now)
            service.output_tokens += generated

    def _index_blocks(self, request: Request, service: Service) -> None:
        """Let others reuse the blocks whose KV is complete and whose tokens are known."""
        assert request.replica is not None
        if not self._state.settings.policy.prefix_reuse:
            return
        size, blocks = service.run_tokens, service.run_blocks
        while (request.indexed + 1) * size <= request.computed:
            start = request.indexed * size
            tokens = tuple(request.tokens[start : start + size])
            at = request.indexed * blocks
            request.replica.ranks.index(request.parents, request.tables, at, tokens, blocks)
            request.indexed += 1

    def _on_token(self, request: Request, service: Service, token: int, price: float) -> bool:
        """A token of a request came, and takes `price` of its budget. True when it was the last."""
        state, cached = self._state, 0
        if not request.emitted:
            cached, request.emitted = request.cached, True
            service.cached_tokens += cached
        state.actions.append(ev.Emit(request.id, (token,), cached))
        if request.failures:
            self._recovery.advanced(request)
        charge(request, price)
        output = len(request.tokens) - request.prompt
        if token not in request.stop_ids and output < request.max_tokens:
            return False
        assert service.profile is not None
        if not request.deferred:
            service.profile.ended(request.prompt, output)
        state.finish(request, "stop" if token in request.stop_ids else "length")
        return True

    def _on_pooled(self, request: Request, service: Service) -> None:
        """Its vector is complete. To those who plan by lengths, that is an answer of one token."""
        assert service.profile is not None
        service.cached_tokens += request.cached
        service.profile.ended(request.prompt, 1)
        self._state.finish(request, "stop")

    # ------------------------------------------------------------------------------------ host process

    def _on_host(self, message: object) -> None:
        match message:
            case msg.Probed(name, directory, shape):
                self._examination.over(name)
                service = self._state.services[name]
                service.directory, service.shape, service.progress = directory, shape, None
                service.split_over(1, self._state.settings)
                costs = StepCosts.guess(self._state.settings.roofline, shape)
                known = self._state.settings.profiles.get(name)
                service.profile = deepcopy(known) if known is not None else ServiceProfile(costs)
                service.arrivals.begin(service.profile.requests_per_second, self._state.now)
                self._residency.look_at_sizes()
            case msg.ProbeFailed(name, reason):
                self._examination.over(name)
                self._loads.refuse(self._state.services[name], reason)
            case msg.ImageReady(name, path, _, _):
                self._images.built(self._state.services[name], path)
            case msg.ImageFailed(name, reason):
                self._state.services[name].image = Image.NONE
                self._loads.image_failed(self._state.services[name], reason)
            case msg.JobProgress(name, stage, done, total):
                self._examination.over(name)
                self._on_progress(name, None if stage == "fetched" else (stage, done, total))

    # ------------------------------------------------------------------------------------ invariants

    def check(self) -> None:
        """Every invariant of the node; raises AssertionError on the first broken one."""
        check_node(self._state)

    def plan_status(self, now: float) -> PlanStatus | None:
        """The plan in force and the best one known; None while nothing is planned."""
        return self._planner.status(now)

    def status(self, now: float) -> NodeStatus:
        """The report of this moment."""
        return node_status(self._state, self._places, now)


def _is_step_done(event: ev.Event) -> TypeGuard[ev.FromDevice]:
    return type(event) is ev.FromDevice and type(event.message) is msg.StepDone

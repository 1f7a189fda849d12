"""One run of the simulator: devices, services, arrivals and a policy in, what clients saw out.

Owns the way from a set-up to an outcome. Must not decide anything that a daemon would: that is `core.node`'s,
which runs here as it does there.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field

import msgspec

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.cost import Roofline, Work
from seallmd.core.host_kv import default_bytes
from seallmd.core.plan import Plan
from seallmd.core.profile import ServiceProfile
from seallmd.core.scheduler import POLICIES
from seallmd.core.settings import NodeSettings, PolicySettings, ReplacementSettings, ServiceSettings
from seallmd.core.shapes import ModelShape
from seallmd.sim import metrics, static
from seallmd.sim.device import STOP, Span
from seallmd.sim.metrics import Report, Served
from seallmd.sim.models import SimError, block_bytes_for
from seallmd.sim.timing import RooflineTiming, isolated_seconds
from seallmd.sim.workload import Arrival, fitted
from seallmd.sim.world import World

PLACEMENTS = {
    "plans": "the node's own, replaced as the load changes",
    "demand": "services come and go, and are replicated, by demand alone",
    "alpa": "AlpaServe's, made once for the whole trace",
    "tp2": "the node's own, each service configured to be split over 2 devices",
    "tp4": "the node's own, each service configured to be split over 4 devices",
}
_RANKS = {"tp2": 2, "tp4": 4}

_GREEDY = msg.Sampling(temperature=0.0)
_LOOK_SECONDS = 1.0  # virtual time between two looks at progress
_ZEROS = (0,) * (1 << 20)


@dataclass(frozen=True)
class Setup:
    """All that a run depends on.

    placement: one of PLACEMENTS. block_bytes: 0 = what suits devices and models. arena_share: of a device's
    memory, the rest is activations and the engine. host_bytes: for host images. drain_seconds: how long after
    the last arrival requests may still finish; those that do not count as failed. span_window: (from, to) in
    which steps and copies are kept, for a Gantt chart. sample_seconds: how often arenas are looked at; 0 =
    never. profiles: of services that were measured: the node knows them, and steps take as long as they say.
    threads: of each CPU device, which idle ones lend; 0 = none does.
    host_kv_bytes: of each device, for the KV of preempted requests; None = as in the daemon.
    """

    shapes: Mapping[str, ModelShape]
    devices: tuple[Roofline, ...]
    arrivals: Sequence[Arrival]
    policy: str = "budget"
    limits: PolicySettings = field(default_factory=PolicySettings)
    replacement: ReplacementSettings = field(default_factory=ReplacementSettings)
    placement: str = "plans"
    block_bytes: int = 0
    arena_share: float = 0.9
    host_bytes: int = 4 << 40
    drain_seconds: float = 600.0
    span_window: tuple[float, float] = (0.0, 0.0)
    sample_seconds: float = 0.0
    profiles: Mapping[str, ServiceProfile] = field(default_factory=dict)
    threads: int = 0
    host_kv_bytes: int | None = None

    def isolated(self) -> dict[str, metrics.Isolated]:
        """T_iso by service: on the device where it is shortest."""
        return {name: self._isolated(Work.of(shape)) for name, shape in self.shapes.items()}

    def _isolated(self, work: Work) -> metrics.Isolated:
        kinds = set(self.devices)
        return lambda prompt, output: min(isolated_seconds(kind, work, prompt, output) for kind in kinds)


@dataclass(frozen=True)
class Occupancy:
    """An arena at a moment, in bytes. weights: by service. cached: reusable prefixes; free: the rest."""

    seconds: float
    device: int
    weights: dict[str, int]
    kv: int
    cached: int
    free: int


@dataclass
class Outcome:
    """What came of a run. busy_seconds: of each device. refused: services that could not be served, and why.

    seconds: from the first arrival to the last end, virtual. cpu_seconds: of the processor, that it took.
    saves: preemptions after which the KV went to host memory. migrations: of running requests to other
    devices. cost_errors: by service, how far predicted step times were off in the end, as a share.
    """

    served: list[Served]
    devices: list[str]
    busy_seconds: list[float]
    seconds: float
    cpu_seconds: float
    events: int
    swaps: int
    preemptions: int
    saves: int
    migrations: int
    refused: dict[str, str] = field(default_factory=dict)
    cost_errors: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    occupancy: list[Occupancy] = field(default_factory=list)

    def report(self, name: str, setup: Setup, rate: float) -> Report:
        """Its figures."""
        total = self.seconds * len(self.busy_seconds)
        return metrics.report(
            name,
            self.served,
            setup.isolated(),
            rate=rate,
            devices=len(self.devices),
            utilisation=sum(self.busy_seconds) / total if total else 0.0,
            swaps=self.swaps,
            preemptions=self.preemptions,
            saves=self.saves,
            migrations=self.migrations,
        )


Progress = Callable[[float], None]


def policies() -> list[str]:
    """Names that `Setup.policy` may have."""
    return list(POLICIES)


def run(setup: Setup, progress: Progress | None = None) -> Outcome:
    """Simulate. progress: told how many virtual seconds of the arrivals are done. Raises SimError."""
    if setup.policy not in policies():
        raise SimError(f"no policy is called {setup.policy!r}; there are {', '.join(policies())}")
    if setup.placement not in PLACEMENTS:
        raise SimError(f"no placement is called {setup.placement!r}; there are {', '.join(PLACEMENTS)}")
    if not setup.arrivals:
        raise SimError("no requests arrive")
    with _uncollected():
        return _Run(setup).run(progress or (lambda _: None))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's cyclic collector, which would look at all requests again and again: a run makes no
    cycles but its world."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _host_kv_bytes(setup: Setup, arena_bytes: int) -> int:
    """What the set-up says, else what the daemon would take on such devices."""
    if setup.host_kv_bytes is not None:
        return setup.host_kv_bytes
    kind, _, _ = setup.devices[0].name.partition(":")
    return default_bytes(arena_bytes, gpu=kind != "cpu")


class _Run:
    """One world from its start to its last answer. Time 0 of a run is `_began` of its world."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._block_bytes = setup.block_bytes or block_bytes_for(setup.devices, setup.shapes.values())
        self._began = 0.0
        self._open: dict[int, Served] = {}
        self._lengths: dict[int, int] = {}
        self._events = 0
        self._next_look = 0.0
        self._spans: list[Span] = []
        self._occupancy: list[Occupancy] = []
        arenas = tuple(int(device.memory_bytes * setup.arena_share) for device in setup.devices)
        policy = msgspec.structs.replace(setup.limits, scheduler=setup.policy)
        replacement = setup.replacement
        self._static = Plan({})
        if setup.placement in ("demand", "alpa"):
            replacement = msgspec.structs.replace(replacement, enabled=False)
        if setup.placement == "alpa":
            known = setup.shapes, setup.devices[0], arenas, setup.arrivals
            self._static = static.alpa(*known, setup.limits.max_rows)
            policy = msgspec.structs.replace(policy, replicate=False)
        settings = NodeSettings(
            services=tuple(self._service(name) for name in setup.shapes),
            devices=len(setup.devices),
            block_bytes=self._block_bytes,
            host_bytes=setup.host_bytes,
            host_kv_bytes=_host_kv_bytes(setup, arenas[0]),
            roofline=setup.devices[0],
            profiles=dict(setup.profiles),
            policy=policy,
            replacement=replacement,
            threads=setup.threads,
        )
        self._world = World(
            settings,
            dict(setup.shapes),
            arenas,
            RooflineTiming(setup.devices, setup.shapes, profiles=deepcopy(dict(setup.profiles))),
            self._observe,
            lengths=self._lengths,
            on_span=self._on_span if setup.span_window[1] > 0 else None,
            keep_history=False,
        )

    def _service(self, name: str) -> ServiceSettings:
        groups = self._static.of(name)
        return ServiceSettings(
            name=name,
            model=name,
            preload=True,
            max_waiting=1 << 20,
            tensor_parallel=len(groups[0]) if groups else _RANKS.get(self._setup.placement, 0),
            devices=groups,
        )

    def run(self, progress: Progress) -> Outcome:
        """From the start of the processes to the last answer."""
        began = time.process_time()
        world = self._world
        world.start()
        world.run()  # every model is read, and what fits is brought in, before the first request
        self._load_static()
        self._began = world.now
        status = world.node.status(world.now)
        swaps_before = sum(service.swaps_in for service in status.services)
        busy_before = [device.busy_seconds for device in world.devices]
        served = self._serve(progress)
        status = world.node.status(world.now)
        return Outcome(
            served=served,
            devices=[device.name for device in self._setup.devices],
            busy_seconds=[d.busy_seconds - b for d, b in zip(world.devices, busy_before, strict=True)],
            seconds=max((s.finished for s in served if not s.error), default=self._now) - served[0].arrived,
            cpu_seconds=time.process_time() - began,
            events=self._events,
            swaps=sum(service.swaps_in for service in status.services) - swaps_before,
            preemptions=sum(service.preemptions for service in status.services),
            saves=sum(service.saves for service in status.services),
            migrations=sum(service.migrations for service in status.services),
            refused={s.name: s.reason for s in status.services if s.state == "refused"},
            cost_errors={s.name: s.cost_error for s in status.services},
            spans=self._spans,
            occupancy=self._occupancy,
        )

    def _load_static(self) -> None:
        """Load the replicas of a static placement, as an operator would; preloading brought one of each."""
        services = self._world.node.state.services
        for ticket, (name, group) in enumerate(self._static.placed(), 1):
            if all(replica.devices != group for replica in services[name].replicas):
                self._world.happen(ev.LoadWanted(ticket, name, group))
                self._world.run()

    def _serve(self, progress: Progress) -> list[Served]:
        """Let every request arrive at its time and end; all of them, in order of arrival."""
        served = []
        for number, arrival in enumerate(self._setup.arrivals, 1):
            self._go_to(arrival.seconds, progress)
            served.append(self._arrive(number, arrival))
        deadline = self._now + self._setup.drain_seconds
        while self._open and self._next_look < deadline:
            self._go_to(self._next_look, progress)
        if self._open:
            self._go_to(deadline, progress)
        for record in self._open.values():
            record.error = "unfinished"
        return served

    def _arrive(self, number: int, arrival: Arrival) -> Served:
        context = self._world.node.context_limit(arrival.service)
        arrival = fitted(arrival, max(2, context))
        record = Served(arrival.service, self._now, arrival.prompt, arrival.output, array("d"))
        self._open[number] = record
        self._lengths[number] = arrival.prompt + arrival.output
        # No two prompts share a prefix. The node is not told how long the answer will be.
        prompt = (number, *_ZEROS[: arrival.prompt - 1])
        most = max(arrival.output, context - arrival.prompt)
        self._world.happen(ev.Arrived(number, arrival.service, prompt, most, _GREEDY, (STOP,)))
        return record

    @property
    def _now(self) -> float:
        return self._world.now - self._began

    def _go_to(self, seconds: float, progress: Progress) -> None:
        """Run the world until a moment; on the way, tell how far it is and look at the arenas."""
        while self._next_look <= seconds:
            self._world.run(until=self._began + self._next_look)
            progress(self._now)
            if self._setup.sample_seconds:
                self._occupancy += self._look()
            self._next_look += self._setup.sample_seconds or _LOOK_SECONDS
        self._world.run(until=self._began + seconds)

    # ------------------------------------------------------------------------------- what is seen

    def _observe(self, _event: ev.Event, actions: list[ev.Action]) -> None:
        self._events += 1
        now = self._world.now - self._began
        for action in actions:
            if type(action) is ev.Emit:  # most are
                times = self._open[action.request].times
                for _ in action.tokens:
                    times.append(now)
            elif isinstance(action, ev.Finish):
                record = self._open.pop(action.request)
                del self._lengths[action.request]
                if action.reason == "stop":
                    record.finished = now
                else:
                    record.error = action.error or action.reason

    def _on_span(self, span: Span) -> None:
        first, last = self._setup.span_window
        began, ended = span.began - self._began, span.ended - self._began
        if began < last and ended > first and self._began:
            self._spans.append(span._replace(began=began, ended=ended))

    def _look(self) -> Iterator[Occupancy]:
        """Every arena at this moment."""
        unit = self._block_bytes
        for device in self._world.node.state.devices.values():
            arena = device.arena
            if arena is None:
                continue
            yield Occupancy(
                seconds=self._now,
                device=device.index,
                weights={name: arena.weights_of(name) * unit for name in device.replicas},
                kv=arena.kv * unit,
                cached=arena.cached * unit,
                free=(arena.available - arena.cached) * unit,
            )

"""A daemon's control socket over a stand-in for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from seallmd.api.control import ControlServer
from seallmd.api.latency_window import Figures
from seallmd.api.server import http_addresses, start_http
from seallmd.api.settings import HttpSettings
from seallmd.core.cost import StepCosts
from seallmd.core.events import OperatorEvent
from seallmd.core.profile import ServiceProfile
from seallmd.core.settings import ServiceSettings
from seallmd.core.shapes import LayerShape, ModelShape
from seallmd.core.status import (
    ArenaMap,
    Cell,
    DeviceStatus,
    NodeStatus,
    Place,
    PlanStatus,
    RequestStatus,
    ServiceDetail,
    ServiceStatus,
)
from seallmd.errors import ControlError
from seallmd.runtime.face import Generation, ServiceView, TokenStream
from seallmd.runtime.feed import EventFeed
from tests.api.engine_double import SPOKEN, FakeEngine, view, write_model

MIB = 1 << 20
LATENCIES = {"busy[red]": Figures((0.25, 1.0, 2.5), (0.04, 0.1, 0.125), ended=17, met=16, failed=0)}

LOST = DeviceStatus(
    device=1,
    label="NVIDIA H200",
    pid=0,
    state="lost",
    capacity_bytes=0,
    weights_bytes=0,
    kv_bytes=0,
    free_bytes=0,
    cached_bytes=0,
    steps=0,
)
UP = DeviceStatus(
    device=0,
    label="cpu (4 threads)",
    pid=4711,
    state="up",
    capacity_bytes=2048 * MIB,
    weights_bytes=1024 * MIB,
    kv_bytes=512 * MIB,
    free_bytes=512 * MIB,
    cached_bytes=128 * MIB,
    steps=12345,
)


def service(name: str, state: str, **fields: object) -> ServiceStatus:
    """A service's report, quiet but for `fields`."""
    quiet = ServiceStatus(
        name=name,
        model=f"org/{name}",
        state=state,
        pinned=False,
        device=None,
        stage=None,
        weights_bytes=0,
        kv_bytes=0,
        context=4096,
        dtype="bfloat16",
        running=0,
        waiting=0,
        tokens_per_second=0.0,
        prompt_tokens=0,
        output_tokens=0,
        preemptions=0,
        swaps_in=0,
        last_swap_seconds=0.0,
        reason="",
    )
    return msgspec.structs.replace(quiet, **fields)


SHAPE = ModelShape(
    "LlamaForCausalLM", "bfloat16", 2, (LayerShape(8, 128, 128),) * 32, (MIB,) * 34, 128256, 8192
)
RUNNING = RequestStatus(7, "busy[red]", "running", 0, 0.5, 100, 12, 50, 0, 0, "")
WAITING = RequestStatus(9, "quick", "waiting", None, 75.0, 20, 0, 16, 0, 1, "its model is being read [x]")


class FakeNode:
    """`EngineFace` as far as the control socket needs it. Loading "slow" ends when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        self.loaded: list[tuple[str, tuple[int, ...]]] = []
        self.evicted: list[tuple[str, bool]] = []
        self.cancelled: list[int] = []
        self.operated: list[OperatorEvent] = []
        self.feed = EventFeed(clock=lambda: 1_800_000_000.0)
        self.waiting = [RUNNING, WAITING]
        self.planned: PlanStatus | None = None
        self.table = {
            "quick": service("quick", "absent"),
            "slow": service("slow", "reading", stage=0.25, device=0),
            "busy[red]": service(
                "busy[red]",
                "resident",
                device=0,
                pinned=True,
                running=3,
                waiting=17,
                tokens_per_second=123.45,
                weights_bytes=1024 * MIB,
                kv_bytes=512 * MIB,
                preemptions=2,
                swaps_in=1,
                last_swap_seconds=0.421,
            ),
            "odd": service("odd", "refused", reason="no such architecture: OddForCausalLM"),
        }

    def services(self) -> list[ServiceView]:
        raise NotImplementedError

    def service(self, name: str) -> ServiceView | None:
        raise NotImplementedError

    def submit(self, generations: list[Generation]) -> list[TokenStream]:
        raise NotImplementedError

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def detail(self, service: str) -> ServiceDetail | None:
        if service not in self.table:
            return None
        status = self.table[service]
        settings = ServiceSettings(name="busy", model=status.model, preload=True)
        known = status.state == "resident"
        return ServiceDetail(
            status=status,
            settings=settings,
            shape=SHAPE if known else None,
            profile=ServiceProfile(StepCosts((0.005, 0.002, 0.0001), [], 0.003, 1.0, 77, 0.12))
            if known
            else None,
            kv_bytes_per_token=SHAPE.kv_bytes_per_token if known else 0,
            places=(Place(0, "resident", 1024 * MIB, 3, 75.0, (0,), (("norms", 61), ("linear layers", 211))),)
            if known
            else (),
        )

    def plan(self) -> PlanStatus | None:
        return self.planned

    def requests(self) -> list[RequestStatus]:
        return self.waiting

    def arena_maps(self, cells: int) -> list[ArenaMap]:
        parts = [Cell("weights", "busy[red]"), Cell("kv", "busy[red]"), Cell("kv", "quick")]
        return [ArenaMap(0, cells, (*parts, *[Cell("free", "")] * (cells - 3)))]

    def status(self) -> NodeStatus:
        return NodeStatus("round-robin", False, 2 * MIB, (UP, LOST), tuple(self.table.values()))

    async def operate(self, make: Callable[[int], OperatorEvent]) -> None:
        """Remembers the event; a drain of "slow" ends when `go` is set."""
        event = make(1)
        name = getattr(event, "service", "")
        if name and name not in self.table:
            raise ControlError(f"there is no service {name!r}")
        self.operated.append(event)
        if name == "slow":
            self.begun.set()
            await self.go.wait()

    def hurry(self, service: str) -> None:
        raise NotImplementedError

    def keep(self, service: str, seconds: float) -> None:
        raise NotImplementedError

    async def load(self, name: str, devices: tuple[int, ...] = ()) -> None:
        if name not in self.table:
            raise ControlError(f"there is no service {name!r}")
        if name == "odd":
            raise ZeroDivisionError
        if name == "slow":
            self.begun.set()
            await self.go.wait()
        self.loaded.append((name, devices))
        self.done.set()

    async def evict(self, name: str, now: bool) -> None:
        if name not in self.table:
            raise ControlError(f"there is no service {name!r}")
        self.evicted.append((name, now))


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def server(node: FakeNode, tmp_path: Path) -> AsyncIterator[ControlServer]:
    """A served control socket."""
    path = tmp_path / "run" / "control.sock"
    server = ControlServer(node, path)
    server.latencies = lambda: LATENCIES
    await server.start()
    yield server
    await server.close()
    assert not path.exists()


@pytest.fixture
def control(server: ControlServer, tmp_path: Path) -> Path:  # noqa: ARG001 - it is served
    """Its path."""
    return tmp_path / "run" / "control.sock"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    tokenizer = write_model(tmp_path)
    answer = [*tokenizer.encode(SPOKEN, add_special_tokens=False).ids, 1]
    engine = FakeEngine([view("m", tmp_path)], answer)
    yield engine
    await engine.close()


@pytest.fixture
async def runner(engine: FakeEngine, server: ControlServer, tmp_path: Path) -> AsyncIterator[web.AppRunner]:
    """HTTP on both kinds of sockets, and the control socket tells where."""
    runner = await start_http(engine, HttpSettings(port=0, socket=str(tmp_path / "http.sock")))
    server.http = http_addresses(runner)
    yield runner
    await runner.cleanup()

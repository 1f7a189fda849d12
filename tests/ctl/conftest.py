"""A daemon's control socket over a stand-in for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from seallmd.api.control import ControlServer
from seallmd.core.status import DeviceStatus, NodeStatus, ServiceStatus
from seallmd.errors import ControlError
from seallmd.runtime.face import Generation, ServiceView, TokenStream

MIB = 1 << 20

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


class FakeNode:
    """`EngineFace` as far as the control socket needs it. Loading "slow" ends when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        self.loaded: list[str] = []
        self.evicted: list[tuple[str, bool]] = []
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
        raise NotImplementedError

    def status(self) -> NodeStatus:
        return NodeStatus("round-robin", False, 2 * MIB, (UP, LOST), tuple(self.table.values()))

    async def load(self, name: str) -> None:
        if name not in self.table:
            raise ControlError(f"there is no service {name!r}")
        if name == "odd":
            raise ZeroDivisionError
        if name == "slow":
            self.begun.set()
            await self.go.wait()
        self.loaded.append(name)
        self.done.set()

    async def evict(self, name: str, now: bool) -> None:
        if name not in self.table:
            raise ControlError(f"there is no service {name!r}")
        self.evicted.append((name, now))


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def control(node: FakeNode, tmp_path: Path) -> AsyncIterator[Path]:
    """The path of a served control socket."""
    path = tmp_path / "run" / "control.sock"
    server = ControlServer(node, path)
    await server.start()
    yield path
    await server.close()
    assert not path.exists()

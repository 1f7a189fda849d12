"""A node whose invariants broke is not served from: the process ends, and is started anew by who runs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from seallmd.core import events as ev
from seallmd.core.cost import ROOFLINES
from seallmd.core.messages import WorkerSettings
from seallmd.core.settings import NodeSettings, ServiceSettings
from seallmd.runtime.devices import DevicePlan
from seallmd.runtime.engine import Engine
from seallmd.runtime.forkserver import ForkServer


async def test_a_broken_invariant_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 1, at once, whatever the event loop would have made of the exception."""
    worker = WorkerSettings("cpu0", "cpu")
    plan = DevicePlan((worker,), worker, 4096, 1 << 20, 0, tmp_path, tmp_path / "meet", ROOFLINES["cpu"])
    settings = NodeSettings(
        services=(ServiceSettings(name="a", model="a"),), devices=1, block_bytes=4096, host_bytes=1 << 20
    )
    engine = Engine(settings, plan, ForkServer())
    codes: list[int] = []

    def broken(_event: ev.Event, _now: float) -> list[ev.Action]:
        raise AssertionError("a block is owned twice")

    monkeypatch.setattr(engine.node, "handle", broken)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(AssertionError):
        engine._happen(ev.Tick())
    assert codes == [1]

"""What worker processes are started with."""

from __future__ import annotations

from pathlib import Path

from seallmd.config import DeviceSettings
from seallmd.runtime import devices


def test_workers_are_told_the_cache(tmp_path: Path) -> None:
    """Protects the speed of CPU devices: a worker without a cache has no place for its compiled operations,
    and runs everything on plain torch."""
    plan = devices.plan(DeviceSettings(kind="cpu", cpu_workers=2, cache=str(tmp_path)))
    assert [worker.cache for worker in plan.workers] == [str(tmp_path)] * 2
    assert plan.host.cache == str(tmp_path)
    assert plan.cache == tmp_path

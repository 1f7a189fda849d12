"""What worker processes are started with."""

from __future__ import annotations

from pathlib import Path

from seallmd.config import DeviceSettings
from seallmd.runtime.devices import plan


def test_workers_are_told_the_cache(tmp_path: Path) -> None:
    """A worker without a cache directory has nowhere to compile its operations to, and runs in plain torch:
    two to three times slower, with nothing in the output to show it."""
    made = plan(DeviceSettings(kind="cpu", cpu_workers=2, cache=str(tmp_path), memory="64 MiB"))
    assert [worker.cache for worker in (*made.workers, made.host)] == [str(tmp_path)] * 3
    assert {worker.rendezvous for worker in made.workers} == {str(made.rendezvous)}


def test_the_host_process_is_told_its_cache_of_images(tmp_path: Path) -> None:
    """Without it every restart builds every image again."""
    made = plan(DeviceSettings(kind="cpu", cache=str(tmp_path), memory="64 MiB", image_cache="3 MiB"))
    assert made.host.image_cache_bytes == 3 << 20
    assert plan(DeviceSettings(kind="cpu", memory="64 MiB", image_cache="0 B")).host.image_cache_bytes == 0

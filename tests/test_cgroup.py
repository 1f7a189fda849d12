"""Limits of control groups, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from seallmd import cgroup
from seallmd.config import DeviceSettings
from seallmd.runtime import devices
from seallmd.worker.process import require_memory

GIB = 1 << 30


def show(
    monkeypatch: pytest.MonkeyPatch, directory: Path, own: str, files: dict[str, object] | None = None
) -> None:
    """own: of /proc/self/cgroup. files: below /sys/fs/cgroup."""
    (directory / "own").write_text(own)
    for name, content in (files or {}).items():
        (directory / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "root" / name).write_text(f"{content}\n")
    monkeypatch.setattr(cgroup, "_ROOT", directory / "root")
    monkeypatch.setattr(cgroup, "_OWN", directory / "own")


def test_a_unit_and_the_slice_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd's MemoryMax= and CPUQuota= are in the unit's own group, not at the root."""
    unit = "system.slice/seallmd.service"
    files: dict[str, object] = {
        f"{unit}/memory.max": 8 * GIB,
        f"{unit}/memory.current": 7 * GIB,
        f"{unit}/memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}\nshmem 4",
        f"{unit}/cpu.max": "150000 100000",
        "system.slice/memory.max": "max",
        "system.slice/cpu.max": "max 100000",
    }
    show(monkeypatch, tmp_path, f"0::/{unit}\n", files)
    assert (cgroup.memory_limit(), cgroup.memory_left(), cgroup.cores()) == (8 * GIB, 4 * GIB, 1.5)


def test_a_container_of_version_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its path is the host's, of which it sees the end alone."""
    files: dict[str, object] = {
        "memory/memory.limit_in_bytes": 2 * GIB,
        "memory/memory.usage_in_bytes": GIB,
        "memory/memory.stat": f"cache 9\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0",
        "cpu/cpu.cfs_quota_us": 400000,
        "cpu/cpu.cfs_period_us": 100000,
    }
    show(monkeypatch, tmp_path, "4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n0::/docker/ab\n", files)
    assert (cgroup.memory_limit(), cgroup.memory_left(), cgroup.cores()) == (2 * GIB, GIB * 3 // 2, 4.0)


def test_without_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a plain machine, of either version, or where nothing is shown at all."""
    unlimited: dict[str, object] = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
        "memory.max": "max",
    }
    show(monkeypatch, tmp_path, "4:memory:/\n1:cpu:/\n0::/\n", unlimited)
    assert (cgroup.memory_limit(), cgroup.memory_left(), cgroup.cores()) == (None, None, None)
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "none")
    assert (cgroup.memory_limit(), cgroup.cores()) == (None, None)


def test_defaults_fit_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arenas and threads for the whole machine, in a container of a fraction of it, end in the kernel's
    out-of-memory killer and in steps that stand still for most of each period."""
    files: dict[str, object] = {
        "memory.max": GIB // 4,
        "memory.current": GIB // 8,
        "cpu.max": "100000 100000",
    }
    show(monkeypatch, tmp_path, "0::/\n", files)
    made = devices.plan(DeviceSettings(kind="cpu", cpu_workers=1, cache=str(tmp_path)))
    assert (made.workers[0].arena_bytes, made.host_bytes) == (GIB // 16, GIB // 8)
    assert made.workers[0].threads == 1
    with pytest.raises(MemoryError, match="the arena needs 129 MiB of memory, 128 MiB are available"):
        require_memory((GIB // 8) + (1 << 20), "the arena")

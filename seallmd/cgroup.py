"""What the control groups of this process leave it of the machine: a container's or a unit's limits.

Owns reading them, of both versions of the kernel's interface; the group itself and all around it count, as
far as a container shows them. Must not know what the memory and the cores are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """Bytes that this process and its children may have at most; None without a limit."""
    return min((limit for _, limit in _memory()), default=None)


def memory_left() -> int | None:
    """Bytes of that which nobody uses; what files fill and the kernel would give back counts as unused."""
    return min((max(0, limit - _used(group)) for group, limit in _memory()), default=None)


def cores() -> float | None:
    """Cores' worth of time that it may have; None without a limit."""
    found = (_quota(group) for group in _groups("cpu"))
    return min((share for share in found if share is not None), default=None)


def _memory() -> Iterator[tuple[Path, int]]:
    """Groups with a limit. One that nobody has set is "max", or in version 1 close to 2**63."""
    for group in _groups("memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit is not None and limit < 1 << 62:
            yield group, limit


def _used(group: Path) -> int:
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    prefix = "" if (group / "memory.current").exists() else "total_"  # version 1: with those below
    kinds = [f"{prefix}active_file", f"{prefix}inactive_file"]
    lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
    return used - sum(int(line[1]) for line in lines if line[0] in kinds)


def _quota(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _groups(controller: str) -> Iterator[Path]:
    for line in _text(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = _ROOT / controller if controllers else _ROOT
        group = base / path.lstrip("/")
        yield group
        while group != base:
            group = group.parent
            yield group


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    """Empty where there is no such file, as in groups that a container does not show."""
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""

"""The faults that wait for a moment: a process is killed while it starts, loads, computes, copies, or ends.

Owns the moments and how they are met: a process is stopped (SIGSTOP) until the daemon's own report says that
it has the wanted work before it, goes on for a few milliseconds, and is killed in the midst of it. Must not
judge: `storm` does.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from tests.chaos.faults import send_signal
from tests.e2e.daemon import Daemon

if TYPE_CHECKING:
    from tests.chaos.storm import Storm

TRIES, HOLD_SECONDS = 12, 0.8  # how often a process is stopped, and for how long, until the moment is there
WITHIN_SECONDS = 0.004  # from the beginning of the work to the end of the process, at most
START_SECONDS = 5.0  # of a daemon, roughly

Moment = Callable[["Storm", int], Awaitable[bool]]


async def kill_in_start(storm: Storm) -> None:
    """A device's process is gone, and so is its successor before it can say a word."""
    before = storm.pids()
    send_signal(storm.pick("seallmd-cpu"), signal.SIGKILL)
    for _ in range(800):
        await asyncio.sleep(0.005)
        if new := sorted(storm.pids() - before):
            send_signal(new[0], signal.SIGSTOP)
            storm.phases["start"] += any(d["state"] != "up" for d in (await storm.status())["devices"])
            send_signal(new[0], signal.SIGCONT)
            await asyncio.sleep(storm.random.uniform(0.0, WITHIN_SECONDS))
            send_signal(new[0], signal.SIGKILL)
            return


async def kill_in_load(storm: Storm) -> None:
    """The loader is gone while it reads a model's weights."""

    async def is_reading(storm: Storm, _pid: int) -> bool:
        services = (await storm.status())["services"]
        return any(service["state"] == "reading" for service in services) or await _swap(storm, services)

    await _kill(storm, "load", "seallmd-host", is_reading)


async def kill_in_prefill(storm: Storm) -> None:
    """A worker is gone while it computes a prompt."""

    async def is_prefilling(storm: Storm, pid: int) -> bool:
        return any(not request["output_tokens"] for request in await _running(storm, pid))

    await _kill(storm, "prefill", "seallmd-cpu", is_prefilling)


async def kill_in_decode(storm: Storm) -> None:
    """A worker is gone in the middle of an answer."""

    async def is_decoding(storm: Storm, pid: int) -> bool:
        return any(request["output_tokens"] for request in await _running(storm, pid))

    await _kill(storm, "decode", "seallmd-cpu", is_decoding)


async def kill_in_copy(storm: Storm) -> None:
    """A worker is gone while weights are copied to it."""

    async def is_copying(storm: Storm, pid: int) -> bool:
        services = await _services(storm, pid)
        return any(service["state"] == "copying" for service in services) or await _swap(storm, services)

    await _kill(storm, "copy", "seallmd-cpu", is_copying)


async def kill_in_evict(storm: Storm) -> None:
    """A worker is gone while a model is taken from it."""

    async def is_evicted(storm: Storm, pid: int) -> bool:
        there = [service["name"] for service in await _services(storm, pid) if service["state"] == "resident"]
        if not there:
            return False
        await storm.command({"op": "evict", "service": storm.random.choice(there), "now": True}, 1)
        return True

    await _kill(storm, "evict", "seallmd-cpu", is_evicted)


async def kill_in_shutdown(storm: Storm) -> None:
    """The daemon is told to stop; a child is killed meanwhile, or hangs, or the daemon itself is killed."""

    async def end(daemon: Daemon) -> None:
        harm, victim = storm.random.choice(
            (
                (signal.SIGKILL, storm.pick("seallmd-cpu")),
                (signal.SIGKILL, storm.pick("seallmd-host")),
                (signal.SIGSTOP, storm.pick("seallmd-cpu")),
                (signal.SIGKILL, daemon.process.pid),
            )
        )
        daemon.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(storm.random.uniform(0.0, 0.2))
        storm.phases["shutdown"] += daemon.process.poll() is None
        send_signal(victim, harm)
        code = await asyncio.to_thread(daemon.process.wait, 60)
        wanted = -signal.SIGKILL if victim == daemon.process.pid else 0
        assert code in (0, wanted), f"the daemon ended with {code}"
        assert code or not daemon.control.exists(), "the control socket is still there"

    await storm.replace_daemon(end)


async def kill_daemon(storm: Storm) -> None:
    """The daemon is gone at once, whatever it was doing; another is started where it was."""

    async def end(daemon: Daemon) -> None:
        daemon.process.kill()
        daemon.process.wait()

    await storm.replace_daemon(end)


async def kill_daemon_in_start(storm: Storm) -> None:
    """The daemon is gone, and so is the next one while it starts."""

    async def end(daemon: Daemon) -> None:
        daemon.process.kill()
        daemon.process.wait()
        starting = storm.open_daemon()
        await asyncio.sleep(storm.random.uniform(0.0, START_SECONDS))
        storm.phases["start"] += 1
        starting.kill()

    await storm.replace_daemon(end)


async def _kill(storm: Storm, phase: str, child: str, moment: Moment) -> None:
    """Kill a child at a moment; if that does not come, at another one."""
    pid = await _held_at(storm, child, moment)
    if pid is not None:
        storm.phases[phase] += 1
        send_signal(pid, signal.SIGCONT)
        await asyncio.sleep(storm.random.uniform(0.0, WITHIN_SECONDS))
    send_signal(pid or storm.pick(child), signal.SIGKILL)


async def _held_at(storm: Storm, child: str, moment: Moment) -> int | None:
    """A child that is stopped, and has some work before it; None when that never came."""
    for _ in range(TRIES):
        pid = storm.pick(child)
        if pid is None:
            await asyncio.sleep(HOLD_SECONDS)
            continue
        send_signal(pid, signal.SIGSTOP)
        end = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < end:
            if await moment(storm, pid):
                return pid
            await asyncio.sleep(0.002)
        send_signal(pid, signal.SIGCONT)
        await asyncio.sleep(0.1)
    return None


async def _swap(storm: Storm, services: list[dict[str, object]]) -> bool:
    """Have one of these leave, and all that are away come: else nothing would while one is stopped. False."""
    if there := [service["name"] for service in services if service["state"] == "resident"]:
        await storm.command({"op": "evict", "service": storm.random.choice(there), "now": True}, 0.05)
    away = [s["name"] for s in (await storm.status())["services"] if s["state"] == "absent"]
    for name in away:
        await storm.command({"op": "load", "service": name}, 0.02)
    return False


async def _running(storm: Storm, pid: int) -> list[dict[str, object]]:
    """The requests that run on a worker."""
    index = await _index(storm, pid)
    requests = (await storm.command({"op": "requests"}, 10))["requests"]
    return [r for r in requests if r["state"] == "running" and r["device"] == index]


async def _services(storm: Storm, pid: int) -> list[dict[str, object]]:
    """The services that lie on a worker, or are on their way to or from it."""
    index = await _index(storm, pid)
    return [s for s in (await storm.status())["services"] if index in s["devices"]]


async def _index(storm: Storm, pid: int) -> int:
    """The number of a worker's device; -1 when it is none's any more."""
    devices = (await storm.status())["devices"]
    return next((device["device"] for device in devices if device["pid"] == pid), -1)

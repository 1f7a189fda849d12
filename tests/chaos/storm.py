"""Chaos through the real daemon: faults at seeded moments, under load, and a judgement after each.

    python -m tests.chaos.storm --faults 300 --seed 1 [--json FILE]

The models are tiny and random, so that hundreds of faults fit into minutes. Faults come in rounds, in each of
which every kind comes up. After each fault the traffic is let run dry, and then: nothing waits, no block is
held, every invariant holds, no process, descriptor, shared memory or half-written file is left over, every
answer was right to the token or one of the promised errors. Whenever a daemon ends, its journal is replayed
with every invariant checked after every event. The seed gives the same faults in the same order with the same
pauses; what they hit depends on the machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import faults, phases
from tests.chaos.faults import Fault, Mend, http_request
from tests.chaos.traffic import Ask, Traffic, asks_of
from tests.e2e.daemon import Daemon
from tests.worker.helpers import save_tiny
from tools import replay

FAMILIES = {"a": "llama", "b": "qwen3", "c": "gemma2", "d": "llama tied"}
CLIENTS = 6
PHASES = ("start", "load", "prefill", "decode", "copy", "evict", "shutdown")  # in which a process may die
_TRIES_AGAIN = 6
RECOVERY_SECONDS = 60.0  # on a busy machine a process takes many seconds to start
HUNG_SECONDS = 3.0
SPARE_DESCRIPTORS = CLIENTS + 4  # that a process may have open more than when it was first seen at rest

# What a round has, and how often.
FAULTS: dict[Fault, int] = {
    faults.kill_worker: 2,
    faults.hang_worker: 1,
    faults.slow_worker: 1,
    faults.slow_copies: 1,
    faults.failing_copies: 1,
    faults.kill_loader: 1,
    faults.slow_loader: 1,
    faults.jump_clock: 1,
    faults.full_memory: 1,
    faults.corrupt_file: 1,
    faults.cut_connection: 2,
    faults.half_close: 1,
    faults.half_request: 1,
    faults.slow_readers: 1,
    faults.evict: 1,
    faults.load: 1,
    faults.leave_command: 1,
    faults.babble: 1,
    faults.reload: 1,
    phases.kill_in_start: 1,
    phases.kill_in_load: 1,
    phases.kill_in_prefill: 1,
    phases.kill_in_decode: 1,
    phases.kill_in_copy: 1,
    phases.kill_in_evict: 1,
    phases.kill_in_shutdown: 1,
    phases.kill_daemon: 1,
    phases.kill_daemon_in_start: 1,
}
ROUND = sum(FAULTS.values())


def deck(seed: int) -> Iterator[Fault]:
    """Faults without end: every round has all of them, in an order of its own."""
    draw = random.Random(seed)
    cards = [fault for fault, times in FAULTS.items() for _ in range(times)]
    while True:
        draw.shuffle(cards)
        yield from cards


class Broken(AssertionError):
    """What was promised does not hold."""


class Storm:
    """One run. directory: of the models, the configuration and the log."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.hung_seconds = HUNG_SECONDS
        self.models = directory / "models"
        self.cache = directory / "cache"
        self.services = list(FAMILIES)
        for name, family in FAMILIES.items():
            save_tiny(self.models / name, family)
        self._share_operations()
        self.directory = directory
        self.runs = 0
        self.tell: Callable[[str], object] = lambda _: None
        self.counts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.recovery: list[float] = []
        self._descriptors: dict[int, int] = {}  # by process: how many were open when it was first at rest
        self._names: set[str] = set()
        self.daemon = self._start()

    def _share_operations(self) -> None:
        """Have the compiled operations in the usual cache, so that they are compiled once and not here."""
        usual = Path("~/.cache/seallmd/ops").expanduser()
        usual.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.cache.mkdir()
        (self.cache / "ops").symlink_to(usual)

    def open_daemon(self) -> Daemon:
        """Start a daemon where the last one was, beside what that one left; what it said is kept."""
        for name in ("log", "run.journal"):
            if (old := self.directory / name).exists():
                old.rename(self.directory / f"{name}.{self.runs}")
        self.runs += 1
        config = f"hung_seconds = {HUNG_SECONDS}\nrestart_seconds = 0.5\nstop_seconds = 20\n"
        config += '[devices]\nkind = "cpu"\ncpu_workers = 2\nthreads = 1\nmemory = "640 KiB"\n'
        config += f'block = "8 KiB"\nhost_kv = "64 KiB"\nhost_memory = "160 KiB"\ncache = "{self.cache}"\n'
        config += '[journal]\nlimit = "1 GiB"\nflight = "2 MiB"\n'
        config += "[policy]\nstep_tokens = 32\npatience_seconds = 0.3\nmin_residency_swaps = 2\n"
        for name in self.services:
            config += f'[[service]]\nname = "{name}"\nmodel = "{self.models / name}"\ndtype = "float32"\n'
        return Daemon(self.directory, config)

    def _start(self) -> Daemon:
        daemon = self.open_daemon()
        daemon.wait_healthy()
        return daemon

    # --------------------------------------------------------------------------------- for faults

    def pick(self, name: str) -> int | None:
        """The pid of a child whose name begins so."""
        found = sorted(child.pid for child in self._children() if _name(child).startswith(name))
        return self.random.choice(found) if found else None

    def pids(self) -> set[int]:
        """Of all processes below the daemon."""
        return {child.pid for child in self._children()}

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.daemon.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def http_request(self, *, stream: bool) -> bytes:
        """Some request of the traffic, as bytes."""
        return http_request(self.daemon.port, self._ask().body(stream=stream))

    def _ask(self) -> Ask:
        return self.random.choice(self.traffic.asks)

    async def command(self, command: dict[str, object], seconds: float) -> dict[str, Any]:
        """One command of the control socket; its last answer, or nothing when it takes longer."""
        reader, writer = await asyncio.open_unix_connection(str(self.daemon.control), limit=1 << 24)
        answer: dict[str, Any] = {"kind": "progress"}
        try:
            writer.write(json.dumps(command).encode() + b"\n")
            async with asyncio.timeout(seconds):
                while answer["kind"] == "progress":
                    answer = json.loads(await reader.readline())
        except TimeoutError:
            pass
        finally:
            writer.close()
        return answer

    async def status(self) -> dict[str, Any]:
        """The node's report."""
        return dict((await self.command({"op": "status"}, 30))["status"])

    async def replace_daemon(self, end: Callable[[Daemon], Awaitable[None]]) -> None:
        """Have the daemon end; nothing may outlive it, and the next one starts beside what it left."""
        self.traffic.down = True
        old = self.daemon
        await end(old)
        await self._until(self._nothing_runs)
        self._replay(self.directory / "run.journal")
        old.kill()
        self.daemon = await asyncio.to_thread(self._start)
        self.traffic.url = self.daemon.url
        await self.traffic.quiet()
        self.traffic.down = False

    async def _nothing_runs(self) -> str:
        """What still runs of a daemon that is gone: its processes' working directory tells."""
        left = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.directory):
                    left.append(process)
            except psutil.Error:
                continue
        return f"the daemon's end left {left}" if left else ""

    # --------------------------------------------------------------------------------- the run

    async def run(self, count: int, seconds: float = float("inf")) -> None:
        """So many faults, or as many as fit. Raises Broken at the first promise that does not hold."""
        self._names, until = _shared_memory(), time.monotonic() + seconds
        async with Traffic(self.daemon.url, asks_of(self.services, self.random), self.seed) as self.traffic:
            await self.traffic.learn()
            self.traffic.start(CLIENTS)
            for number, fault in zip(range(1, count + 1), deck(self.seed), strict=False):
                await self._one(number, fault)
                if time.monotonic() > until:
                    break
            if count >= ROUND:
                await self._meet_every_phase(count)
            await self._all_answer()
            await self.traffic.quiet()
        if self.daemon.stop() != 0:
            raise Broken("the daemon did not stop well")
        await self._until(self._nothing_runs)
        self._replay(self.daemon.journal)
        await self._until(self._nothing_left)

    async def _meet_every_phase(self, number: int) -> None:
        """Deaths whose moment did not come are tried again, a few times."""
        deaths = {fault.__name__.removeprefix("kill_in_"): fault for fault in FAULTS}
        for again in range(number + 1, number + 1 + _TRIES_AGAIN):
            missed = [phase for phase in PHASES if not self.phases[phase]]
            if not missed:
                return
            await self._one(again, deaths[missed[0]])

    async def _one(self, number: int, fault: Fault) -> None:
        # Of its own, so that what a fault draws does not depend on how long the last one took.
        self.random = random.Random(f"{self.seed} {number}")
        await asyncio.sleep(self.random.uniform(0.0, 0.4))
        self.counts[fault.__name__] += 1
        try:
            mend: Mend | None = await fault(self)
            await asyncio.sleep(self.random.uniform(0.0, 0.3))
            if mend is not None:
                mend()
            began = time.monotonic()
            await self._recover()
        except (AssertionError, TimeoutError) as error:
            text = str(error) or type(error).__name__
            raise Broken(f"fault {number} ({fault.__name__}, seed {self.seed}): {text}") from error
        self.recovery.append(time.monotonic() - began)
        self.tell(f"{number} {fault.__name__}: at rest after {self.recovery[-1]:.1f} s")
        self.traffic.open.set()

    async def _recover(self) -> None:
        """Let the traffic run dry, and look."""
        await self.traffic.quiet(RECOVERY_SECONDS)
        if self.daemon.process.poll() is not None:
            raise Broken("the daemon is dead")
        if self.traffic.wrong:
            raise Broken("; ".join(self.traffic.wrong[:3]))
        await self._until(self._is_at_rest)
        await self._until(self._is_whole)
        await self._invariants_hold()
        await self._until(self._nothing_left)

    async def _until(self, condition: Any) -> None:
        end = time.monotonic() + RECOVERY_SECONDS
        while trouble := await condition():
            if time.monotonic() > end:
                raise Broken(trouble)
            await asyncio.sleep(0.05)

    async def _is_at_rest(self) -> str:
        """What is still held though nobody asks for anything."""
        status = await self.status()
        held = [(d["kv_bytes"], d["host_kv_bytes"]) for d in status["devices"]]
        lost = [
            d["capacity_bytes"] - d["weights_bytes"] - d["kv_bytes"] - d["free_bytes"]
            for d in status["devices"]
        ]
        busy = [s["name"] for s in status["services"] if s["running"] or s["waiting"]]
        if any(map(any, held)) or any(lost) or busy:
            return f"blocks are held: {held}, or lost: {lost}, work is left: {busy}"
        return ""

    async def _is_whole(self) -> str:
        """What is missing, or too much: processes and descriptors."""
        status = await self.status()
        names = Counter(_name(child).rstrip("0123456789") for child in self._children())
        if any(device["state"] != "up" for device in status["devices"]):
            # One that is stopped owes nothing while nobody asks: somebody has to.
            return "a device is down"
        if names["seallmd-cpu"] != 2 or names["seallmd-host"] != 1:
            return f"processes: {dict(names)}"
        return self._descriptors_left()

    def _descriptors_left(self) -> str:
        """Which process has more descriptors open than when it was first seen at rest."""
        for process in (psutil.Process(self.daemon.process.pid), *self._children()):
            count = process.num_fds()
            first = self._descriptors.setdefault(process.pid, count)
            if count > first + SPARE_DESCRIPTORS:
                return f"{process.name()} has {count} descriptors open, and had {first}"
        return ""

    async def _invariants_hold(self) -> None:
        """SIGUSR1 has the daemon look at all of its books."""
        words = "status of invariants: "
        seen = self.daemon.log.read_text(errors="replace").count(words)
        self.daemon.process.send_signal(signal.SIGUSR1)

        async def is_told() -> str:
            return "" if self.daemon.log.read_text(errors="replace").count(words) > seen else "no report"

        await self._until(is_told)
        said = self.daemon.log.read_text(errors="replace").rpartition(words)[2].splitlines()[0]
        if said != "all hold":
            raise Broken(said)

    async def _nothing_left(self) -> str:
        """What lies about though nobody needs it: names in shared memory, half-written and stale files."""
        left = sorted(_shared_memory() - self._names)
        if left and (others := _mapped_by_others(self.pids())):
            left = [name for name in left if f"/dev/shm/{name}" not in others]
        left += [path.name for path in self.cache.rglob("*.partial")]
        left += [path.name for path in (self.cache / "rendezvous").iterdir() if not _runs(path.name)]
        return f"left behind: {left}" if left else ""

    async def _all_answer(self) -> None:
        """In the end every model answers, whatever was done to it."""
        for index, ask in enumerate(self.traffic.asks):
            end = time.monotonic() + RECOVERY_SECONDS
            while True:
                try:
                    tokens = await self.traffic.ask(ask, stream=False)
                    break
                except Exception as error:
                    if time.monotonic() > end:
                        raise Broken(f"{ask.service} does not answer any more: {error}") from error
                    await asyncio.sleep(0.2)
            if tokens != self.traffic.right[index]:
                raise Broken(f"{ask.service} answers otherwise than before")

    def _replay(self, journal: Path) -> None:
        """A daemon that was killed while it started has none."""
        if journal.exists() and journal.stat().st_size and replay.main([str(journal), "--check"]) != 0:
            raise Broken(f"{journal} does not replay")

    def figures(self) -> dict[str, object]:
        """What there is to tell."""
        recovery = sorted(self.recovery)
        return {
            "seed": self.seed,
            "faults": sum(self.counts.values()),
            "by_fault": dict(self.counts.most_common()),
            "killed_in_phase": dict(self.phases.most_common()),
            "answers": dict(self.traffic.outcomes.most_common()),
            "recovery_seconds": {
                "median": round(recovery[len(recovery) // 2], 2),
                "longest": round(recovery[-1], 2),
            },
            "daemons": self.runs,
        }


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _runs(meeting: str) -> bool:
    """Whether the process lives whose directory has this name."""
    return Path("/proc", meeting.rpartition("-")[2]).exists()


def _shared_memory() -> set[str]:
    """Names that a daemon could leave there."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def _mapped_by_others(pids: set[int]) -> str:
    """What processes that have nothing to do with the daemon have mapped: some of it may be shared memory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in pids:
            with contextlib.suppress(OSError):
                found.append((process / "maps").read_text())
    return "\n".join(found)


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 1 when a promise was broken; the log of the daemon then stays where it is."""
    parser = argparse.ArgumentParser(description="Faults for a real daemon under load.")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after the fault at hand")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="seallmd-storm-"))
    storm = Storm(directory, options.seed)
    storm.tell = partial(print, file=sys.stderr, flush=True)
    try:
        asyncio.run(storm.run(options.faults, options.seconds))
    except Broken as error:
        print(f"{error}\nlogs: {directory}", file=sys.stderr)
        return 1
    finally:
        storm.daemon.kill()
    text = json.dumps(storm.figures(), indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Chaos through the real daemon: faults at seeded moments, under load, and a judgement after each.

    python -m tests.chaos.storm --faults 300 --seed 1 [--json FILE]

The models are tiny and random, so that hundreds of faults fit into minutes. After each fault the traffic is
let run dry, and then: nothing waits, no block is held, no process and no descriptor is left over, every
answer was right to the token or one of the promised errors. At the end the journal is replayed with every
invariant checked after every event. The seed gives the same faults in the same order with the same pauses;
what they hit depends on the machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.faults import FAULTS, Mend, http_request
from tests.chaos.traffic import Ask, Traffic, asks_of
from tests.e2e.daemon import Daemon
from tests.worker.helpers import save_tiny
from tools import replay

FAMILIES = {"a": "llama", "b": "qwen3", "c": "gemma2", "d": "llama tied"}
CLIENTS = 6
RECOVERY_SECONDS = 60.0  # on a busy machine a process takes many seconds to start
HUNG_SECONDS = 3.0


class Broken(AssertionError):
    """What was promised does not hold."""


class Storm:
    """One run. directory: of the models, the configuration and the log."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.hung_seconds = HUNG_SECONDS
        self.models = directory / "models"
        self.services = list(FAMILIES)
        for name, family in FAMILIES.items():
            save_tiny(self.models / name, family)
        self.directory = directory
        self.runs = 0
        self.counts: Counter[str] = Counter()
        self.recovery: list[float] = []
        self.daemon = self._start()
        self.descriptors = 0

    def _start(self) -> Daemon:
        directory = self.directory / f"run{self.runs}"
        directory.mkdir()
        self.runs += 1
        config = f"hung_seconds = {HUNG_SECONDS}\nrestart_seconds = 0.5\nstop_seconds = 20\n"
        config += '[devices]\nkind = "cpu"\ncpu_workers = 2\nthreads = 1\nmemory = "640 KiB"\n'
        config += 'block = "8 KiB"\nhost_kv = "64 KiB"\n'
        config += '[journal]\nlimit = "1 GiB"\n'
        config += "[policy]\nstep_tokens = 32\npatience_seconds = 0.3\nmin_residency_seconds = 0.2\n"
        for name in self.services:
            config += f'[[service]]\nname = "{name}"\nmodel = "{self.models / name}"\ndtype = "float32"\n'
        daemon = Daemon(directory, config)
        daemon.wait_healthy()
        return daemon

    # --------------------------------------------------------------------------------- for faults

    def pick(self, name: str) -> int | None:
        """The pid of a child whose name begins so."""
        found = sorted(child.pid for child in self._children() if _name(child).startswith(name))
        return self.random.choice(found) if found else None

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

    async def start_again(self) -> None:
        """Kill the daemon; nothing may outlive it, and the next one starts beside what it left."""
        self.traffic.down = True
        family, old = self._children(), self.daemon
        old.process.kill()
        old.process.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
        if alive:
            raise Broken(f"the daemon's death left {alive}")
        self._replay(old)
        old.kill()
        old.control.unlink(missing_ok=True)
        self.daemon = await asyncio.to_thread(self._start)
        self.traffic.url = self.daemon.url
        await self.traffic.quiet()
        self.traffic.down = False
        self.descriptors = 0

    # --------------------------------------------------------------------------------- the run

    async def run(self, faults: int, seconds: float = float("inf")) -> None:
        """So many faults, or as many as fit. Raises Broken at the first promise that does not hold."""
        before, until = _leavings(), time.monotonic() + seconds
        async with Traffic(self.daemon.url, asks_of(self.services, self.random), self.seed) as self.traffic:
            await self.traffic.learn()
            self.traffic.start(CLIENTS)
            for number in range(1, faults + 1):
                await self._one(number)
                if time.monotonic() > until:
                    break
            await self._all_answer()
            await self.traffic.quiet()
        if self.daemon.stop() != 0:
            raise Broken("the daemon did not stop well")
        self._replay(self.daemon)
        if left := _leavings() - before:
            raise Broken(f"left behind: {sorted(left)}")

    async def _one(self, number: int) -> None:
        fault = self.random.choices(list(FAULTS), list(FAULTS.values()))[0]
        await asyncio.sleep(self.random.uniform(0.0, 0.4))
        self.counts[fault.__name__] += 1
        mend: Mend | None = await fault(self)
        await asyncio.sleep(self.random.uniform(0.0, 0.3))
        if mend is not None:
            mend()
        began = time.monotonic()
        try:
            await self._recover()
        except (Broken, TimeoutError) as error:
            raise Broken(f"fault {number} ({fault.__name__}, seed {self.seed}): {error}") from error
        self.recovery.append(time.monotonic() - began)
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

    async def _until(self, condition: Any) -> None:
        end = time.monotonic() + RECOVERY_SECONDS
        while trouble := await condition():
            if time.monotonic() > end:
                raise Broken(trouble)
            await asyncio.sleep(0.05)

    async def _is_at_rest(self) -> str:
        """What is still held though nobody asks for anything."""
        status = await self.status()
        held = [d["kv_bytes"] for d in status["devices"] if d["kv_bytes"]]
        busy = [s["name"] for s in status["services"] if s["running"] or s["waiting"]]
        return f"blocks are held: {held}, work is left: {busy}" if held or busy else ""

    async def _is_whole(self) -> str:
        """What is missing, or too much: processes and descriptors."""
        status = await self.status()
        names = Counter(_name(child).rstrip("0123456789") for child in self._children())
        if any(device["state"] != "up" for device in status["devices"]):
            # One that is stopped owes nothing while nobody asks: somebody has to.
            return "a device is down"
        if names["seallmd-cpu"] != 2 or names["seallmd-host"] != 1:
            return f"processes: {dict(names)}"
        count = psutil.Process(self.daemon.process.pid).num_fds()
        self.descriptors = self.descriptors or count + CLIENTS + 4
        return "" if count <= self.descriptors else f"{count} descriptors are open, {self.descriptors} were"

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

    def _replay(self, daemon: Daemon) -> None:
        if replay.main([str(daemon.journal), "--check"]) != 0:
            raise Broken(f"{daemon.journal} does not replay")

    def figures(self) -> dict[str, object]:
        """What there is to tell."""
        recovery = sorted(self.recovery)
        return {
            "seed": self.seed,
            "faults": sum(self.counts.values()),
            "by_fault": dict(self.counts.most_common()),
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


def _leavings() -> set[str]:
    """Names that a daemon could leave in shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


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

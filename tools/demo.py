"""Shows seallmd at work on this machine: `make demo`, or `python -m tools.demo`.

Starts a daemon of its own (free port, private control socket), streams from every configured service at once
with OpenAI's own client, evicts one service and loads it again while the others go on, shows how long it all
took, and stops the daemon. Exits 0 when nothing failed, else 1 with the reason and the end of the log.

Owns the daemon that it starts: whatever happens here, it does not stay behind. Must not know anything of the
daemon beyond its command line, its HTTP side and `seallmctl`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seallmd import config
from seallmd.errors import SeallmdError
from seallmd.worker.process import bind_to_parent
from tools.demo_streams import Stream, Wall, table_of

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"

START_SECONDS = 300.0
COMMAND_SECONDS = 120.0
STOP_SECONDS = 60.0
_GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.3
_LOG_LINES = 30
_UNSETTLED = ("probing", "reading", "copying", "draining")

_BEGINNINGS = (
    "The three most important things to know about the sea are",
    "Once upon a time, a small computer had to do the work of many.",
)
_QUESTION = "In two sentences: why is the sky blue?"

Report = dict[str, Any]


class DemoError(SeallmdError):
    """Something did not work as it should; one line."""


# ------------------------------------------------------------------------------------------ the daemon


class Daemon:
    """A seallmd of our own, from `running` to `stop`. base_url: for OpenAI clients. more: arguments to it.
    log: what it says."""

    def __init__(self, configuration: Path, folder: Path, *more: str) -> None:
        self._port = _free_port(config.load(configuration).http.port)
        self._control = folder / "control.sock"
        self.log = folder / "daemon.log"
        self.base_url = f"http://{HOST}:{self._port}/v1"
        command = [
            str(BIN / "seallmd"),
            "--config",
            str(configuration),
            "--host",
            HOST,
            "--port",
            str(self._port),
            *more,
        ]
        with self.log.open("w") as log:
            # A session of its own: a Ctrl-C here reaches it as the one SIGTERM of `stop`. Should this process
            # be killed, the kernel ends the daemon (and the daemon's end its workers).
            self._process = subprocess.Popen(
                [*command, "--control", str(self._control)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=bind_to_parent,
            )

    @property
    def pid(self) -> int:
        """Of its main process."""
        return self._process.pid

    def check(self) -> None:
        """Raise DemoError if it has ended."""
        if self._process.poll() is not None:
            raise DemoError(f"the daemon ended with code {self._process.returncode}")

    def is_healthy(self) -> bool:
        """What /health says."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def ctl(self, *words: str) -> list[str]:
        """The command line of a seallmctl that speaks to this daemon."""
        return [str(BIN / "seallmctl"), "--socket", str(self._control), *words]

    def status(self) -> Report | None:
        """`seallmctl status --json`; None while nobody answers."""
        done = subprocess.run(self.ctl("status", "--json"), capture_output=True, text=True, check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else None

    def end_of_log(self) -> str:
        """Its last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def stop(self) -> None:
        """SIGTERM. Raises DemoError unless it exits with 0 in time and leaves no process behind."""
        self.check()
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the daemon did not stop within {STOP_SECONDS:.0f} s of SIGTERM") from None
        _, alive = psutil.wait_procs(family, timeout=5)
        if code != 0:
            raise DemoError(f"the daemon ended with code {code} after SIGTERM")
        if alive:
            raise DemoError(f"the daemon left processes behind: {', '.join(str(p.pid) for p in alive)}")

    def end(self) -> None:
        """Make sure that it is gone: as asked if it can, else at once; its children end with it."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(configuration: Path, console: Console) -> Iterator[Daemon]:
    """A daemon that does not outlive the block. On a failure, shows what the daemon said last."""
    with tempfile.TemporaryDirectory(prefix="seallmd-demo-") as folder:
        daemon = Daemon(configuration, Path(folder))
        try:
            yield daemon
        except (SeallmdError, openai.OpenAIError):
            console.print("\nThe end of the daemon's log:", style="bold")
            console.print(Text(daemon.end_of_log() or "(empty)"))
            raise
        finally:
            daemon.end()


def _free_port(wanted: int) -> int:
    """The wanted port, or any if that is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------- the acts


def wait_until_ready(daemon: Daemon, console: Console) -> None:
    """Follow the start until every service is examined and what is to be preloaded is there."""
    began = time.monotonic()
    told: dict[str, str] = {}
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while time.monotonic() - began < START_SECONDS:
            daemon.check()
            report = daemon.status()
            services = [] if report is None else report["services"]
            seconds = time.monotonic() - began
            if console.is_terminal:
                lines = [f"starting: {seconds:.0f} s", *(_state_line(service) for service in services)]
                live.update(Text("\n".join(lines)), refresh=True)
            for service in services:
                name, state = service["name"], service["state"]
                if not console.is_terminal and told.get(name) != state:
                    console.print(f"{seconds:6.1f} s  {name}: {state}")
                    told[name] = state
            if report is not None and daemon.is_healthy() and _is_settled(report):
                break
            time.sleep(_POLL_SECONDS)
        else:
            raise DemoError(f"the daemon is not ready after {START_SECONDS:.0f} s")
    console.print(f"ready after {time.monotonic() - began:.1f} s")


def _state_line(service: Report) -> str:
    stage = "" if service["stage"] is None else f" {service['stage']:.0%}"
    return f"  {service['name']}: {service['state']}{stage}"


def _is_settled(report: Report) -> bool:
    """Nothing is on its way. Raises DemoError when a service was refused or could not be loaded."""
    for service in report["services"]:
        if service["reason"]:
            raise DemoError(f"{service['name']} cannot be served: {service['reason']}")
    return not any(service["state"] in _UNSETTLED for service in report["services"])


async def all_at_once(client: openai.AsyncOpenAI, console: Console, beginnings: int, tokens: int) -> None:
    """Act one: every service at once. beginnings: completions per service; tokens: of each answer."""
    services = [model.id async for model in client.models.list()]
    streams = [Stream(service, prompt, tokens) for prompt in _BEGINNINGS[:beginnings] for service in services]
    streams += [Stream(service, _QUESTION, tokens, chat=True) for service in services]
    console.rule(f"{len(services)} services stream at once")
    with Wall(console, streams):
        await asyncio.gather(*(stream.run(client) for stream in streams))
    _conclude([stream for stream in streams if not stream.unserved], console)


async def swap_while_streaming(
    daemon: Daemon, client: openai.AsyncOpenAI, console: Console, tokens: int
) -> None:
    """Act two: one resident service goes and comes back while the other residents go on."""
    report = daemon.status()
    residents = [s["name"] for s in (report or {"services": []})["services"] if s["state"] == "resident"]
    if not residents:
        raise DemoError("no service is resident after it has just answered")
    moved, *others = residents
    console.rule(f"{moved} goes and comes back; others that stream meanwhile: {len(others)}")
    over, streams = asyncio.Event(), [Stream(service, _BEGINNINGS[0], tokens) for service in others]
    with Wall(console, streams):
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream.run_until(over, client))
            try:
                times = {verb: await _timed(daemon.ctl(verb, moved)) for verb in ("evict", "load")}
            finally:
                over.set()
    for verb, seconds in times.items():
        console.print(f"seallmctl {verb} {moved}: {seconds:.2f} s")
    _conclude(streams, console)


async def _timed(command: Sequence[str]) -> float:
    """Run a command; its seconds. Raises DemoError when it fails."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        _, errors = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
    except TimeoutError:
        raise DemoError(f"{' '.join(command[3:])} takes more than {COMMAND_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise DemoError(errors.decode(errors="replace").strip() or f"{command[3]} failed")
    return time.monotonic() - began


def _conclude(streams: Sequence[Stream], console: Console) -> None:
    """Show the times. Raises DemoError if a stream failed."""
    if streams:
        console.print(table_of(streams))
    if failed := [stream for stream in streams if stream.error]:
        raise DemoError(f"{len(failed)} streams failed; the first: {failed[0].title}: {failed[0].error}")


def show_swaps(daemon: Daemon, console: Console) -> None:
    """What came in how often, and how long the last time took."""
    table = Table(title="swaps", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for title in ("SERVICE", "WEIGHTS", "SWAPPED IN", "LAST TOOK"):
        table.add_column(title, justify="left" if title == "SERVICE" else "right")
    for service in (daemon.status() or {"services": []})["services"]:
        took = f"{service['last_swap_seconds']:.2f} s" if service["swaps_in"] else "-"
        table.add_row(
            service["name"], f"{service['weights_bytes'] >> 20} MiB", str(service["swaps_in"]), took
        )
    console.print(table)


# ----------------------------------------------------------------------------------------- command line


async def _play(daemon: Daemon, console: Console, *, quick: bool) -> None:
    tokens = 8 if quick else 32
    async with openai.AsyncOpenAI(base_url=daemon.base_url, api_key="none", timeout=300) as client:
        await all_at_once(client, console, beginnings=1 if quick else 2, tokens=tokens)
        console.rule("seallmctl status")
        await asyncio.to_thread(subprocess.run, daemon.ctl("status"), check=False)
        await swap_while_streaming(daemon, client, console, tokens)
    show_swaps(daemon, console)


def demonstrate(configuration: Path, console: Console, *, quick: bool) -> None:
    """The whole demo. Raises SeallmdError or openai.OpenAIError with what failed."""
    with running(configuration, console) as daemon:
        console.rule(f"seallmd on {daemon.base_url}")
        wait_until_ready(daemon, console)
        asyncio.run(_play(daemon, console, quick=quick))
        began = time.monotonic()
        daemon.stop()
        console.print(f"stopped in {time.monotonic() - began:.1f} s; no process was left behind")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when all went well, 1 when something failed, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Start seallmd, stream from all services, swap, stop it.")
    parser.add_argument("--config", type=Path, default=ROOT / "seallmd.toml", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few and short answers, for tests")
    options = parser.parse_args(arguments)
    # Where there is no terminal, lines may be as long as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        demonstrate(options.config, console, quick=options.quick)
    except (SeallmdError, openai.OpenAIError) as error:
        console.print(Text(f"\nFAILED: {error}", style="bold red"))
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; the daemon is stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

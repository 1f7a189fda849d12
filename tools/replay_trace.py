"""Sends a trace to real servers, and reports what their clients saw.

    python -m tools.replay_trace --service chat http://127.0.0.1:8000/v1 smollm2-135m-instruct \\
        --service code http://127.0.0.1:8000/v1 gemma-3-270m --trace conv.csv code.csv --rate 0.5

Any server with OpenAI's `/completions` will do. Requests are sent at their times whether or not earlier ones
have been answered (open loop). Before that, each service is asked a few requests one by one: how many tokens
a word is, whether it knows `ignore_eos`, and T_iso (a line through latencies of different lengths). To
compare servers, take T_iso from one of them for all: `--isolated REPORT.json`.

Exit code 0; 1 when requests failed; 2 when nothing could be sent. Servers on other machines are refused
without --allow-remote. The number of requests and every wait are bounded.

Owns the command line and the run. `tools.replay_client` speaks HTTP; `seallmd.sim.metrics` has the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from seallmd.sim import metrics
from seallmd.sim.metrics import Report, Seen, Served
from seallmd.sim.models import SimError
from seallmd.sim.workload import Arrival, fitted, from_traces, read_trace, resized
from tools.replay_client import Line, Service, get_to_know, is_loopback, isolated_line

_FILE_COLUMNS = 160
_CALIBRATION_OUTPUT = 64  # most tokens of a calibration's answer: one by one they take long


class ReplayFile(msgspec.Struct):
    """What `--json` writes. isolated: T_iso by service. late_seconds: how late the client itself was.

    requests: each of them, for `tools.simulate --compare`.
    """

    reports: list[Report]
    isolated: dict[str, Line]
    late_seconds: float
    errors: dict[str, int]
    requests: list[Seen] = []


class _IsolatedFile(msgspec.Struct):
    isolated: dict[str, Line]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    services = [Service(*words) for words in options.service]
    try:
        _check(services, options.allow_remote)
        arrivals = arrivals_of(options, [service.name for service in services])
        isolated = read_isolated(options.isolated, services) if options.isolated else None
        result = asyncio.run(replay(options.name, services, arrivals, isolated, options.timeout))
    except SimError as error:
        print(f"replay_trace: {error}", file=sys.stderr)
        return 2
    _show(result)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 1 if result.errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Send a trace to OpenAI-compatible servers.")
    add = parser.add_argument
    add(
        "--service",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "URL", "MODEL"),
        help="a service, its base URL (.../v1) and its model there; once for each",
    )
    add_workload(parser)
    add("--timeout", type=float, default=300.0, help="most seconds that one request may take")
    add("--isolated", type=Path, metavar="FILE", help="take T_iso from another report")
    add("--name", default="server", help="of the run, in tables")
    add("--allow-remote", action="store_true", help="servers may be on other machines")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The options that say which requests are sent."""
    add = parser.add_argument
    add("--trace", type=Path, nargs="+", required=True, help="CSV: seconds, prompt_tokens, output_tokens")
    add("--rate", type=float, default=1.0, help="requests per second of all services")
    add("--seconds", type=float, default=60.0, help="in which requests are sent")
    add("--alpha", type=float, default=0.9, help="services of one trace: shares ~ (i + 1) ** -alpha")
    add("--seed", type=int, default=0)
    add("--lengths", type=float, default=1.0, help="prompts and answers are so many times the trace's")
    add("--context", type=int, default=2048, help="longer requests are cut to so many tokens")
    add("--requests", type=int, default=1000, help="most requests that are sent")


def _check(services: Sequence[Service], allow_remote: bool) -> None:
    if len({service.name for service in services}) < len(services):
        raise SimError("two services have the same name")
    for service in services:
        if not allow_remote and not is_loopback(service.url):
            raise SimError(f"{service.name} is on another machine, or has no http URL (--allow-remote)")


def arrivals_of(options: argparse.Namespace, services: Sequence[str]) -> list[Arrival]:
    """The requests that the options of `add_workload` ask for. Raises SimError."""
    positive = (options.rate, options.seconds, options.lengths, options.context - 1, options.requests)
    if min(positive) <= 0:
        raise SimError("rate, seconds, lengths, context and requests are above 0")
    arrivals = from_traces(
        [read_trace(path) for path in options.trace],
        services,
        rate=options.rate,
        seconds=options.seconds,
        alpha=options.alpha,
        seed=options.seed,
    )
    arrivals = [resized(arrival, options.lengths) for arrival in arrivals[: options.requests]]
    return [fitted(arrival, options.context) for arrival in arrivals]


def read_isolated(path: Path, services: Sequence[Service]) -> dict[str, Line]:
    """T_iso of all these services from another report. Raises SimError."""
    try:
        isolated = msgspec.json.decode(path.read_bytes(), type=_IsolatedFile).isolated
    except (OSError, msgspec.DecodeError) as error:
        raise SimError(f"{path.name} is no report: {error}") from None
    if missing := [service.name for service in services if service.name not in isolated]:
        raise SimError(f"{path.name} has no T_iso of {', '.join(missing)}")
    return isolated


# ------------------------------------------------------------------------------------------- the run


def open_session(request_seconds: float) -> aiohttp.ClientSession:
    """For requests of at most so many seconds, as many at once as there are."""
    # A limit on connections would be a queue in the client, which hides the server's. Each request has its
    # own, as if from people of its own: some servers (llama.cpp's) close kept ones without notice.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=request_seconds))


async def replay(
    name: str,
    services: Sequence[Service],
    arrivals: Sequence[Arrival],
    isolated: dict[str, Line] | None,
    request_seconds: float,
) -> ReplayFile:
    """Get to know the services, send every request at its time, and report under `name`.

    isolated: T_iso by service; None: it is measured first. request_seconds: most that one may take. Raises
    SimError when a service does not answer; requests that fail later are in the report.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    async with open_session(request_seconds) as session:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task("calibrating", total=len(services))
            lines = dict(isolated or {})
            for service in services:
                await get_to_know(service, session)
                if isolated is None:
                    lengths = _typical(arrivals, service.name)
                    lines[service.name] = await isolated_line(service, session, *lengths)
                bars.advance(task)
            task = bars.add_task("requests", total=len(arrivals))
            by_name = {service.name: service for service in services}
            served, late = await _send_all(by_name, session, arrivals, lambda: bars.advance(task))
    functions: dict[str, metrics.Isolated] = {service: lines[service].seconds for service in by_name}
    errors = [record.error for record in served if record.error]
    seconds = max(arrivals[-1].seconds - arrivals[0].seconds, 1.0)
    report = metrics.report(name, served, functions, rate=len(arrivals) / seconds)
    counts = {text: errors.count(text) for text in sorted(set(errors))}
    return ReplayFile([report], lines, late, counts, metrics.seen(served))


def _typical(arrivals: Sequence[Arrival], name: str) -> tuple[list[int], list[int]]:
    """A short and a long prompt and answer of the service's own, so that the line need not reach far."""
    own = [arrival for arrival in arrivals if arrival.service == name]

    def ends(values: list[int]) -> list[int]:
        values.sort()
        low, high = values[len(values) // 10], values[len(values) * 9 // 10]
        return [low, max(high, low + 8)]

    if not own:
        return [16, 128], [4, 16]
    outputs = [min(arrival.output, _CALIBRATION_OUTPUT) for arrival in own]
    return ends([arrival.prompt for arrival in own]), ends(outputs)


async def _send_all(
    services: dict[str, Service],
    session: aiohttp.ClientSession,
    arrivals: Sequence[Arrival],
    advance: Callable[[], None],
) -> tuple[list[Served], float]:
    """Every request at its time. The records, and the most seconds that one was sent late."""
    words = random.Random()  # without a seed: the server may still have the prompts of an earlier run cached
    began = time.perf_counter()
    late = 0.0

    async def one(service: Service, prompt: str, arrival: Arrival, due: float) -> Served:
        record = await service.complete(session, prompt, arrival.output, due)
        advance()
        return record

    async with asyncio.TaskGroup() as group:
        tasks = []
        for arrival in arrivals:
            service = services[arrival.service]
            prompt = service.prompt(arrival.prompt, words)
            due = began + arrival.seconds
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late = max(late, time.perf_counter() - due)
            tasks.append(group.create_task(one(service, prompt, arrival, due)))
    return [task.result() for task in tasks], late


# ------------------------------------------------------------------------------------------- showing


def _show(result: ReplayFile) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    for report in result.reports:
        console.print(metrics.table_of_runs([report]))
        console.print(metrics.table_of_services(report))
    for name, line in result.isolated.items():
        console.print(f"T_iso of {name}: {line}", highlight=False)
    console.print(f"the client sent at most {result.late_seconds * 1e3:.0f} ms late", highlight=False)
    for text, count in result.errors.items():
        console.print(f"{count} failed: {text}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())

"""Time to the first token of a model that is not there: seallmd's swap against servers that load it anew.

    python -m tools.bench_absent --service a models/smollm2-135m-instruct smollm2-f16.gguf \\
        --service b models/gemma-3-270m gemma-f16.gguf --memory '700 MiB' \\
        --llama-server build/bin/llama-server --llama-python venv/bin/python

Every system may hold one of the models at a time (seallmd: --memory of its one device must not be enough for
two). They are asked for in turn; each request comes --pause seconds after the end of the one before, and
waits for its model. A second request follows at once and finds the model there: the difference is the swap.
Models have been there before, so that files are in the page cache and seallmd has its host images.

Then, for --seconds, each model has a client of its own, which asks again as soon as it has its answer.

Exit code 0, or 2 when a system could not be run (one that is not installed is no failure).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from seallmd.errors import SeallmdError
from seallmd.sim.metrics import Served
from seallmd.sim.models import SimError
from tools.bench_rivals import add_systems, hosted_of, machine_of
from tools.replay_client import Service, get_to_know
from tools.replay_trace import open_session
from tools.rivals import NotInstalledError, offered

SYSTEMS = ("seallmd budget", "llama-cpp-python", "router --models-max 1")
_PROMPT, _OUTPUT = 16, 4  # tokens
_CLIENT_PROMPT, _CLIENT_OUTPUT = 32, 16  # of a client of its own


class First(msgspec.Struct):
    """Seconds to the first token, of each request for an absent model and of each right after it; and to the
    last token of each request of the clients that ask side by side."""

    system: str
    absent: dict[str, list[float]]
    present: dict[str, list[float]]
    beside: dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    hosted, machine, code = hosted_of(options), machine_of(options), 0
    found: list[First] = []
    for system in options.system or SYSTEMS:
        try:
            with offered(system, hosted, machine) as services:
                found.append(asyncio.run(_ask(system, services, options)))
        except NotInstalledError as error:
            print(error, file=sys.stderr)
        except SeallmdError as error:
            print(f"{system}: {error}", file=sys.stderr)
            code = 2
    print("\n".join(table_of(found)))
    if options.seconds:
        print("\n".join(["", *table_beside(found, options.seconds)]))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time to the first token of an absent model.")
    add_systems(parser)
    add = parser.add_argument
    add("--turns", type=int, default=10, help="swaps to each model")
    add("--pause", type=float, default=0.5, help="seconds between the end of a request and the next swap")
    add("--seconds", type=float, default=20, help="for which a client of each model asks; 0 = none does")
    add("--context", type=int, default=1024, help="tokens of a request")
    add("--json", type=Path, metavar="FILE", help="write all times")
    parser.set_defaults(workers=1)
    return parser


async def _ask(system: str, services: Sequence[Service], options: argparse.Namespace) -> First:
    """Both parts of the bench. Raises SimError when a request fails."""
    names = [service.name for service in services]
    absent, present, beside = ({name: list[float]() for name in names} for _ in range(3))
    words = random.Random()
    async with open_session(options.timeout) as session:
        for service in services:
            await get_to_know(service, session)
        for _ in range(options.turns):
            for service in services:
                await asyncio.sleep(options.pause)
                for times in (absent[service.name], present[service.name]):
                    record = await _complete(service, session, words, _PROMPT, _OUTPUT)
                    times.append(record.times[0] - record.arrived)
        until = time.perf_counter() + options.seconds

        async def client(service: Service) -> None:
            while time.perf_counter() < until:
                record = await _complete(service, session, words, _CLIENT_PROMPT, _CLIENT_OUTPUT)
                beside[service.name].append(record.finished - record.arrived)

        await asyncio.gather(*map(client, services))
    return First(system, absent, present, beside)


async def _complete(
    service: Service, session: aiohttp.ClientSession, words: random.Random, prompt: int, output: int
) -> Served:
    record = await service.complete(session, service.prompt(prompt, words), output)
    if record.error or not record.times:
        raise SimError(f"{service.name}: {record.error or 'no text came'}")
    return record


def table_of(found: Sequence[First]) -> list[str]:
    """Lines of a Markdown table, one for each system and model. The last column is of medians."""
    head = ("system", "model", "swaps", "absent: median s", "P90", "most", "present: median s", "x the first")
    rows = [head, ("---",) * len(head)]
    base = {name: statistics.median(times) for name, times in found[0].absent.items()} if found else {}
    for first in found:
        for name, times in first.absent.items():
            median = statistics.median(times)
            rows.append(
                (
                    first.system,
                    name,
                    str(len(times)),
                    f"{median:.3f}",
                    f"{sorted(times)[math.ceil(0.9 * len(times)) - 1]:.3f}",
                    f"{max(times):.3f}",
                    f"{statistics.median(first.present[name]):.3f}",
                    f"{median / base[name]:.1f}",
                )
            )
    return _lines(rows)


def table_beside(found: Sequence[First], seconds: float) -> list[str]:
    """The same of clients that ask side by side."""
    head = ("system", "model", f"requests in {seconds:g} s", "latency: mean s", "median", "most")
    rows = [head, ("---",) * len(head)]
    for first in found:
        for name, times in first.beside.items():
            figures = (statistics.mean(times), statistics.median(times), max(times))
            rows.append((first.system, name, str(len(times)), *(f"{figure:.2f}" for figure in figures)))
    return _lines(rows)


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())

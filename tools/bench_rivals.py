"""The same trace through seallmd and through what people use instead, one after the other, by one client.

    python -m tools.bench_rivals --out bench --service chat models/smollm2-135m-instruct smollm2-f16.gguf \\
        --service code models/gemma-3-270m gemma-f16.gguf --trace conv.csv code.csv --lengths 0.125 \\
        --rate 0.7 --llama-server build/bin/llama-server --llama-python venv/bin/python

Systems are those of `tools.rivals`; --system, once for each, chooses. A run is a file in --out, which
`tools.simulate --compare` reads; one that is there already is not repeated, and all of them are printed in
the end, as Markdown. T_iso is measured on the first system and kept in --out for all others. Beside each run
of seallmd is what it had learnt of the services (.profiles, for `tools.simulate --profiles`). Before what is
measured, every system gets the first --warm-up requests of the trace.

Exit code 0; 1 when requests failed; 2 when a system could not be run (one that is not installed is no
failure).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from seallmd.errors import SeallmdError
from seallmd.sim.metrics import TYPICAL_SCALE, Seen, Spread
from tools.replay_client import Line
from tools.replay_trace import ReplayFile, add_workload, arrivals_of, read_isolated, replay
from tools.rivals import Hosted, Machine, NotInstalledError, offered

SYSTEMS = (
    *(f"seallmd {policy}" for policy in ("budget", "round-robin", "fcfs", "adbs", "dedicated")),
    "llama-server",
    "llama-server -t 1",
    "llama-cpp-python",
    "router --models-max 1",
)
_ISOLATED = "isolated.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    hosted, machine, code = hosted_of(options), machine_of(options), 0
    for system in options.system or SYSTEMS:
        path = options.out / f"{_slug(system)}-{options.rate:g}.json"
        if path.exists():
            continue
        print(f"{system} at {options.rate:g} req/s", file=sys.stderr)
        try:
            journal = path.with_suffix(".journal") if options.journal else None
            result = _measure(options, system, hosted, replace(machine, journal=journal))
        except NotInstalledError as error:
            print(f"  {error}", file=sys.stderr)
            continue
        except SeallmdError as error:
            print(f"  {error}", file=sys.stderr)
            code = 2
            continue
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
        if system.startswith("seallmd"):
            shutil.copyfile(machine.cache / "profiles.json", path.with_suffix(".profiles"))
        code = max(code, 1 if result.errors else 0)
    print("\n".join(table_of(_found(options.out))))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One trace through several servers, one after the other.")
    add_systems(parser)
    add_workload(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="one file per run")
    add("--warm-up", type=int, default=8, help="requests before those that count")
    add("--journal", action="store_true", help="of each run of seallmd, for tools/replay.py")
    return parser


def add_systems(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    add = parser.add_argument
    add(
        "--service",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "CHECKPOINT", "GGUF"),
        help="a service, its model's directory, and the same weights for llama.cpp; once for each",
    )
    add("--system", action="append", metavar="'KIND WORDS'", help="one of tools.rivals; once for each")
    add("--llama-server", type=Path, metavar="FILE", help="llama.cpp's server")
    add("--llama-python", type=Path, metavar="FILE", help="a Python that has llama-cpp-python[server]")
    add("--dtype", default="bfloat16", help="of seallmd's weights and KV")
    add("--workers", type=int, default=2, help="seallmd's CPU devices")
    add("--memory", default="", help="of each of them")
    add("--cache", type=Path, default=Path("~/.cache/seallmd").expanduser(), help="seallmd's cache")
    add("--timeout", type=float, default=240.0, help="most seconds that one request may take")


def hosted_of(options: argparse.Namespace) -> list[Hosted]:
    """The services of the options."""
    return [Hosted(name, Path(checkpoint), Path(gguf)) for name, checkpoint, gguf in options.service]


def machine_of(options: argparse.Namespace) -> Machine:
    """How the options want systems to be run."""
    return Machine(
        llama_server=options.llama_server,
        llama_python=options.llama_python,
        dtype=options.dtype,
        workers=options.workers,
        memory=options.memory,
        context=options.context,
        cache=options.cache.absolute(),
    )


def _measure(
    options: argparse.Namespace, system: str, hosted: Sequence[Hosted], machine: Machine
) -> ReplayFile:
    """One system, from its start to its end."""
    arrivals = arrivals_of(options, [one.name for one in hosted])
    with offered(system, hosted, machine) as services:
        known = options.out / _ISOLATED
        isolated = read_isolated(known, services) if known.exists() else None

        async def run() -> ReplayFile:
            warm = await replay(system, services, arrivals[: options.warm_up], isolated, options.timeout)
            if isolated is None:
                known.write_bytes(msgspec.json.encode({"isolated": warm.isolated}))
            return await replay(system, services, arrivals, warm.isolated, options.timeout)

        return asyncio.run(run())


def _slug(system: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", system)


class _Named(msgspec.Struct):
    name: str
    rate: float


class Run(msgspec.Struct):
    """One of the files, as far as it is shown."""

    reports: list[_Named]
    isolated: dict[str, Line]
    requests: list[Seen]


def _found(folder: Path) -> list[Run]:
    """Every run in the folder, by rate."""
    files = (path for path in folder.glob("*.json") if path.name != _ISOLATED)
    runs = [msgspec.json.decode(path.read_bytes(), type=Run) for path in files]
    return sorted(runs, key=lambda run: (run.reports[0].rate, run.reports[0].name))


# ------------------------------------------------------------------------------------------ shown

_HEAD = (
    "system",
    "req/s",
    "served",
    "output tokens",
    "ms/token mean",
    "P50",
    "P99",
    "slowdown mean",
    "P50",
    "P99",
    "TTFT s mean",
    "P50",
    "P99",
    f"within {TYPICAL_SCALE}x",
)


def table_of(runs: Sequence[Run]) -> list[str]:
    """Lines of a Markdown table, one for each run; means are over all requests."""
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_row, runs)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(run: Run) -> tuple[str, ...]:
    served = [(r, r.latency) for r in run.requests if r.latency is not None]
    slowdowns = [latency / run.isolated[r.service].seconds(r.prompt, r.output) for r, latency in served]
    within = sum(slowdown <= TYPICAL_SCALE for slowdown in slowdowns) / len(run.requests)
    return (
        run.reports[0].name,
        f"{run.reports[0].rate:.2f}",
        f"{len(served)}/{len(run.requests)}",
        str(sum(r.output for r, _ in served)),
        *_cells([latency * 1e3 / r.output for r, latency in served], 0),
        *_cells(slowdowns, 1),
        *_cells([r.ttft for r, _ in served if r.ttft is not None], 2),
        f"{within:.0%}",
    )


def _cells(values: Sequence[float], digits: int) -> list[str]:
    spread = Spread.of(values)
    return [f"{value:.{digits}f}" for value in (spread.mean, spread.p50, spread.p99)]


if __name__ == "__main__":
    sys.exit(main())

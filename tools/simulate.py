"""Compares policies in virtual time: the daemon's own decisions on devices that are made up.

    python -m tools.simulate --models muxserve --devices '28*a100-80g,1*a100-80g:4' --rate 20,40
    python -m tools.simulate --trace conv.csv code.csv --models 'llama-7b,llama-13b' --plots plots/
    python -m tools.simulate --compare report.json --profiles ~/.cache/seallmd/profiles.json \\
        --devices 2*cpu --models chat=smollm2-135m,code=gemma-3-270m --policy budget

The last predicts a run of a real daemon that `tools.replay_trace --json` has recorded.

Prints one line per policy and rate. Exit code 0, or 2 when what was asked for cannot be done.

Owns the command line. What the columns mean is said in `seallmd.sim.metrics`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from seallmd.config import Size
from seallmd.core.cost import ROOFLINES
from seallmd.core.settings import PolicySettings, ReplacementSettings
from seallmd.sim import comparison, experiment, metrics
from seallmd.sim.experiment import Outcome, Setup
from seallmd.sim.metrics import Seen
from seallmd.sim.models import CONTEXT_TOKENS, MODELS, PRESETS, SimError, parse_devices, parse_models
from seallmd.sim.workload import Arrival, Lengths, from_traces, read_trace, synthetic

_GANTT_SECONDS = 5.0
_FILE_COLUMNS = 160
_SAMPLES = 300  # looks at the arenas of one run


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        recorded = comparison.read_recording(options.compare) if options.compare else []
        runs = _run_all(options, console, recorded)
    except SimError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    reports = [report for _, _, report in runs]
    _show(runs, options.services)
    for _, outcome, report in runs if recorded else ():
        _show_comparison(report.name, comparison.compare(recorded, metrics.seen(outcome.served)))
    if options.json is not None:
        options.json.write_bytes(metrics.encode(reports))
    if options.plots is not None:
        _plot(options.plots, runs)
    return 0


Run = tuple[Setup, Outcome, metrics.Report]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare policies in virtual time.")
    add = parser.add_argument
    models = f"{', '.join(MODELS)}; or a set: {', '.join(PRESETS)}"
    add("--models", default="small", help=f"COUNT*MODEL or SERVICE=MODEL,... of {models}")
    kinds = ", ".join(ROOFLINES)
    devices = f"COUNT*KIND,..., KIND:N is N that act as one, KIND@GIB other memory, kinds: {kinds}"
    add("--devices", default="2*a100-80g", help=devices)
    names, places = ", ".join(experiment.policies()), ", ".join(experiment.PLACEMENTS)
    policy = f"one or more of {names}; POLICY@PLACEMENT has another placement than the first of {places}"
    add("--policy", type=_names, default=["round-robin", "fcfs", "budget"], help=policy)
    add("--rate", type=_rates, default=[2.0], help="requests per second of all services, one or more")
    add("--seconds", type=float, default=120.0, help="of virtual time in which requests arrive")
    add("--seed", type=int, default=0)
    add("--trace", type=Path, nargs="+", help="CSV files: seconds, prompt_tokens, output_tokens")
    add("--compare", type=Path, metavar="FILE", help="simulate what tools.replay_trace --json recorded")
    add(
        "--warm-up",
        type=int,
        default=0,
        help="of a recorded run: requests that came before (tools.bench_rivals)",
    )
    add("--profiles", type=Path, metavar="FILE", help="take step times from a daemon's profiles.json")
    add(
        "--threads",
        type=int,
        default=0,
        help="of each CPU device, which lends them while idle; 0: none lends",
    )
    add("--alpha", type=float, default=0.9, help="service i gets a share proportional to (i + 1) ** -alpha")
    add("--cv", type=float, default=1.0, help="variation of arrival gaps: 1 Poisson, more comes in bursts")
    add("--prompt", type=float, default=161.0, help="mean prompt tokens of made-up requests")
    add("--output", type=float, default=337.0, help="mean output tokens of made-up requests")
    add("--context", type=int, default=CONTEXT_TOKENS, help="longer requests are cut to so many tokens")
    add("--step-tokens", type=int, default=PolicySettings().step_tokens)
    add("--max-rows", type=int, default=PolicySettings().max_rows)
    add("--split-efficiency", type=float, default=PolicySettings().split_efficiency)
    add("--no-replicate", action="store_true", help="no service comes in on a second device")
    add("--no-migrate", action="store_true", help="running requests stay where they are")
    add("--host-kv", type=_bytes, metavar="SIZE", help="[devices] host_kv, like '4 GiB'")
    add("--drain-seconds", type=float, default=600.0, help="who is not done then counts as failed")
    add("--no-replacement", action="store_true", help="services come and go by demand alone")
    add("--services", action="store_true", help="print the services of every run as well")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plots", type=Path, metavar="DIR", help="write charts (PNG)")
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


def _bytes(text: str) -> int:
    if not Size(text).bytes_ and text.split()[:1] != ["0"]:
        raise ValueError("a size is like 4 GiB")
    return Size(text).bytes_


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if min(rates) <= 0:
        raise ValueError("rates are above 0")
    return rates


# ------------------------------------------------------------------------------------------- running


def _run_all(options: argparse.Namespace, console: Console, recorded: Sequence[Seen]) -> list[Run]:
    """Every policy at every rate, on the same arrivals."""
    shapes, devices = parse_models(options.models, max(2, options.context)), parse_devices(options.devices)
    traces = [read_trace(path) for path in options.trace or ()]
    profiles = comparison.read_profiles(options.profiles) if options.profiles else {}
    if strangers := profiles.keys() - shapes.keys():
        raise SimError(f"profiles of {', '.join(sorted(strangers))}, which --models does not name")
    limits = PolicySettings(
        step_tokens=options.step_tokens,
        max_rows=options.max_rows,
        replicate=not options.no_replicate,
        migrate=not options.no_migrate,
        split_efficiency=options.split_efficiency,
    )
    plots = options.plots is not None
    middle = options.seconds / 2
    runs: list[Run] = []
    for rate in [len(recorded) / max(recorded[-1].seconds, 1.0)] if recorded else options.rate:
        arrivals = _recorded(recorded, shapes, options.warm_up) or _arrivals(
            options, list(shapes), traces, rate
        )
        for name in options.policy:
            policy, _, placement = name.partition("@")
            setup = Setup(
                shapes=shapes,
                devices=devices,
                arrivals=arrivals,
                policy=policy,
                limits=limits,
                replacement=ReplacementSettings(enabled=not options.no_replacement),
                placement=placement or "plans",
                drain_seconds=options.drain_seconds,
                host_kv_bytes=options.host_kv,
                profiles=profiles,
                threads=options.threads,
                span_window=(middle, middle + _GANTT_SECONDS) if plots else (0.0, 0.0),
                sample_seconds=options.seconds / _SAMPLES if plots else 0.0,
            )
            runs.append(_run(name, setup, rate, options, console))
    return runs


def _recorded(recorded: Sequence[Seen], services: Collection[str], warm_up: int) -> list[Arrival]:
    if strangers := {request.service for request in recorded} - set(services):
        raise SimError(f"requests of {', '.join(sorted(strangers))}, which --models does not name")
    return comparison.arrivals_of(recorded, warm_up)


def _arrivals(
    options: argparse.Namespace, services: list[str], traces: list[list[Arrival]], rate: float
) -> list[Arrival]:
    seconds, alpha, seed = options.seconds, options.alpha, options.seed
    if traces:
        return from_traces(traces, services, rate=rate, seconds=seconds, alpha=alpha, seed=seed)
    lengths = Lengths(options.prompt, options.output)
    return synthetic(
        services, rate=rate, seconds=seconds, alpha=alpha, seed=seed, cv=options.cv, lengths=lengths
    )


def _run(name: str, setup: Setup, rate: float, options: argparse.Namespace, console: Console) -> Run:
    bar = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} s"))
    quiet = not console.is_terminal
    with Progress(*bar, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task(f"{name} at {rate:g} req/s", total=options.seconds)
        outcome = experiment.run(setup, lambda now: bars.update(task, completed=now))
    outcome.served = outcome.served[options.warm_up if options.compare else 0 :]
    speed = outcome.events / max(outcome.cpu_seconds, 1e-9)
    console.print(
        f"{name} at {rate:g} req/s, {len(outcome.devices)} devices, {len(outcome.served)} requests: "
        f"{outcome.seconds:.0f} s simulated in {outcome.cpu_seconds:.1f} s of one core, {speed:.0f} events/s",
        soft_wrap=True,
        highlight=False,
    )
    for service, reason in outcome.refused.items():
        console.print(f"  {service} is refused: {reason}", soft_wrap=True, highlight=False)
    return setup, outcome, outcome.report(name, setup, rate)


# ------------------------------------------------------------------------------------------- showing


def _show(runs: Sequence[Run], services: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS  # a file does not end after 80 columns
    console.print(metrics.table_of_runs(report for _, _, report in runs))
    for _, _, report in runs if services else ():
        console.print(metrics.table_of_services(report))


def _show_comparison(name: str, figures: Sequence[comparison.Figures]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    console.print(f"measured -> predicted ({name})", highlight=False)
    console.print(comparison.table_of(figures))


def _plot(folder: Path, runs: Sequence[Run]) -> None:
    from seallmd.sim import plots  # takes a second to import, and only charts need it

    folder.mkdir(parents=True, exist_ok=True)
    reports = [report for _, _, report in runs]
    if len({report.rate for report in reports}) > 1:
        plots.latency_against_rate(reports, folder / "latency.png")
    plots.attainment(reports, folder / "attainment.png")
    for setup, outcome, report in runs:
        name = f"{report.name}-{report.rate:g}"
        plots.gantt(outcome, list(setup.shapes), setup.span_window, folder / f"gantt-{name}.png")
        plots.occupancy(outcome, list(setup.shapes), folder / f"memory-{name}.png")


if __name__ == "__main__":
    sys.exit(main())

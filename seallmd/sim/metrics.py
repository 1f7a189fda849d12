"""What users of a server notice: latencies per token, slowdowns, targets met.

Owns the record of one served request, the figures over many of them, and how these are shown. Must not know
where the records are from: the simulator, or a client of real servers (`tools/replay_trace.py`).

Terms (all times in seconds): latency = finish - arrival. T_iso = the latency of the same request alone.
slowdown = latency / T_iso. TTFT = first token - arrival. Normalized latency of a set of services = mean over
services of mean slowdown (our reading of SeaLLM's L_N). Attainment at k = share of all requests, failed ones
included, with latency <= k * T_iso.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

SCALES = range(1, 21)  # k of the attainment curve
TYPICAL_SCALE = 5

Isolated = Callable[[int, int], float]  # (prompt, output) tokens -> T_iso


class Served(msgspec.Struct):
    """One request and what its client saw.

    prompt, output: tokens (of the finished answer). times: when each token, or piece of text, came. error:
    why there is no complete answer; empty when there is one.
    """

    service: str
    arrived: float
    prompt: int
    output: int
    times: array[float]
    finished: float = math.nan
    error: str = ""

    @property
    def latency(self) -> float:
        """From its arrival to the end of its answer."""
        return self.finished - self.arrived


class Seen(msgspec.Struct, frozen=True):
    """One request as a report keeps it, enough to simulate it: lengths in tokens, times in seconds.

    seconds: its arrival, counted from the first one's. latency, ttft: None when there is no complete answer.
    """

    service: str
    seconds: float
    prompt: int
    output: int
    latency: float | None
    ttft: float | None


def seen(served: Sequence[Served]) -> list[Seen]:
    """What a report keeps of each request, in order of arrival."""
    first = min((s.arrived for s in served), default=0.0)
    return [
        Seen(
            s.service,
            s.arrived - first,
            s.prompt,
            s.output,
            None if s.error else s.latency,
            None if s.error or not s.times else s.times[0] - s.arrived,
        )
        for s in sorted(served, key=lambda s: s.arrived)
    ]


class Spread(msgspec.Struct, frozen=True):
    """A distribution in a few numbers: nearest-rank percentiles; not a number when there is nothing."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """The distribution of these values."""
        if len(values) == 0:
            return cls(math.nan, math.nan, math.nan, math.nan)
        ranks = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf")
        return cls(float(np.mean(values)), *map(float, ranks))


class Summary(msgspec.Struct, frozen=True):
    """Figures over some requests. ms_per_token: latency per output token, in milliseconds.

    attainment: for each of SCALES. inter_token_seconds: between tokens (or pieces) of one answer.
    """

    requests: int
    failed: int
    output_tokens: int
    ms_per_token: Spread
    slowdown: Spread
    ttft_seconds: Spread
    inter_token_seconds: Spread
    attainment: tuple[float, ...]


class Report(msgspec.Struct, frozen=True):
    """One run. name: what served (a policy, a server). rate: requests per second that were sent.

    seconds: from the first arrival to the last end. utilisation: mean share of the time that devices stepped.
    swaps: copies of a model to a device. saves: preemptions whose KV went to host memory. migrations: of
    running requests, to other devices. None: the client cannot know.
    """

    name: str
    rate: float
    seconds: float
    normalized_latency: float
    overall: Summary
    services: dict[str, Summary]
    devices: int | None = None
    utilisation: float | None = None
    swaps: int | None = None
    preemptions: int | None = None
    saves: int | None = None
    migrations: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all services."""
        return self.overall.output_tokens / self.seconds if self.seconds else 0.0


def report(
    name: str,
    served: Iterable[Served],
    isolated: Mapping[str, Isolated],
    *,
    rate: float,
    devices: int | None = None,
    utilisation: float | None = None,
    swaps: int | None = None,
    preemptions: int | None = None,
    saves: int | None = None,
    migrations: int | None = None,
) -> Report:
    """All figures of a run. isolated: T_iso by service; the same for all runs that are to be compared."""
    served = list(served)
    services = {n: _summary([s for s in served if s.service == n], isolated) for n in isolated}
    slowdowns = [s.slowdown.mean for s in services.values() if s.requests > s.failed]
    ends = [s.finished for s in served if not math.isnan(s.finished)]
    return Report(
        name=name,
        rate=rate,
        seconds=max(ends) - min(s.arrived for s in served) if ends else 0.0,
        normalized_latency=float(np.mean(slowdowns)) if slowdowns else math.nan,
        overall=_summary(served, isolated),
        services=services,
        devices=devices,
        utilisation=utilisation,
        swaps=swaps,
        preemptions=preemptions,
        saves=saves,
        migrations=migrations,
    )


def _summary(served: Sequence[Served], isolated: Mapping[str, Isolated]) -> Summary:
    well = [s for s in served if not s.error]
    slowdowns = np.array([s.latency / isolated[s.service](s.prompt, s.output) for s in well])
    gaps = [np.diff(np.asarray(s.times)) for s in well]
    return Summary(
        requests=len(served),
        failed=len(served) - len(well),
        output_tokens=sum(s.output for s in well),
        ms_per_token=Spread.of([s.latency * 1e3 / s.output for s in well]),
        slowdown=Spread.of(slowdowns),
        ttft_seconds=Spread.of([s.times[0] - s.arrived for s in well if s.times]),
        inter_token_seconds=Spread.of(np.concatenate(gaps) if gaps else []),
        attainment=tuple(float(np.sum(slowdowns <= k)) / len(served) if served else math.nan for k in SCALES),
    )


# ------------------------------------------------------------------------------------------- shown


def encode(reports: Sequence[Report]) -> bytes:
    """JSON of the reports, indented; what is not a number becomes null."""
    return msgspec.json.format(msgspec.json.encode({"reports": reports}), indent=2) + b"\n"


_COLUMNS = (
    "served",
    "slowdown",
    "P99",
    "ms/tok",
    "P99",
    "TTFT s",
    "P99",
    "ITL ms",
    "P99",
    f"SLO {TYPICAL_SCALE}x",
)
_RUN_COLUMNS = ("tok/s", "devices", "util.", "swaps", "preempt.", "saved", "moved")


def table_of_runs(reports: Iterable[Report]) -> Table:
    """One line per run; slowdown is the normalized latency, ms/tok a mean, TTFT and ITL are medians."""
    table = _table("run", ("req/s", *_COLUMNS, *_RUN_COLUMNS))
    for run in reports:
        table.add_row(
            run.name,
            f"{run.rate:.3g}",
            *_cells(run.overall, run.normalized_latency),
            f"{run.tokens_per_second:.0f}",
            "" if run.devices is None else str(run.devices),
            "" if run.utilisation is None else f"{run.utilisation:.0%}",
            *("" if count is None else str(count) for count in _counts(run)),
        )
    return table


def _counts(run: Report) -> tuple[int | None, ...]:
    return run.swaps, run.preemptions, run.saves, run.migrations


def table_of_services(run: Report) -> Table:
    """One line per service of a run; slowdown and ms/tok are means, TTFT and ITL medians."""
    table = _table("service", _COLUMNS, f"{run.name} at {run.rate:.3g} req/s")
    for name, summary in run.services.items():
        table.add_row(name, *_cells(summary, summary.slowdown.mean))
    return table


def _table(first: str, columns: Sequence[str], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(summary: Summary, slowdown: float) -> list[str]:
    served = summary.requests - summary.failed
    return [
        str(served) if not summary.failed else f"{served}/{summary.requests}",
        f"{slowdown:.2f}",
        f"{summary.slowdown.p99:.1f}",
        f"{summary.ms_per_token.mean:.1f}",
        f"{summary.ms_per_token.p99:.0f}",
        f"{summary.ttft_seconds.p50:.2f}",
        f"{summary.ttft_seconds.p99:.2f}",
        f"{summary.inter_token_seconds.p50 * 1e3:.0f}",
        f"{summary.inter_token_seconds.p99 * 1e3:.0f}",
        f"{summary.attainment[TYPICAL_SCALE - 1]:.1%}",
    ]

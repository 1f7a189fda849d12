"""What the simulator predicts for requests that a real daemon has served, beside what their clients saw.

Owns the reading of a recorded run (`tools/replay_trace.py --json`) and of the costs that a daemon has learnt
(the profiles file in its cache), and the figures side by side. Must not simulate: that is `experiment`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from seallmd.core.profile import ServiceProfile
from seallmd.sim.metrics import Seen, Spread
from seallmd.sim.models import SimError
from seallmd.sim.workload import Arrival

_WARM_UP_SECONDS = 10.0  # from the last request of a warm-up to what is measured


class _Recording(msgspec.Struct):
    requests: list[Seen] = []


class _Entry(msgspec.Struct):
    profile: ServiceProfile


def read_recording(path: Path) -> list[Seen]:
    """The requests of a recorded run. Raises SimError."""
    try:
        requests = msgspec.json.decode(path.read_bytes(), type=_Recording).requests
    except (OSError, msgspec.DecodeError) as error:
        raise SimError(f"{path.name} is no report of a replayed trace: {error}") from None
    if not requests:
        raise SimError(f"{path.name} has no requests")
    return requests


def read_profiles(path: Path) -> dict[str, ServiceProfile]:
    """What a daemon learnt of its services, by name. Raises SimError."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, _Entry])
    except (OSError, msgspec.DecodeError) as error:
        raise SimError(f"{path.name} has no profiles: {error}") from None
    return {name: entry.profile for name, entry in entries.items()}


def arrivals_of(recorded: Sequence[Seen], warm_up: int = 0) -> list[Arrival]:
    """The same requests for the simulator: those that failed are left out, nobody knows their lengths.

    warm_up: the first so many come once more before all others, with time to end: where replicas are when a
    measured run begins depends on what was asked for before.
    """
    arrivals = [Arrival(r.seconds, r.service, r.prompt, r.output) for r in recorded if r.latency is not None]
    if not warm_up:
        return arrivals
    before = arrivals[:warm_up]
    later = before[-1].seconds + _WARM_UP_SECONDS
    return [*before, *(replace(arrival, seconds=arrival.seconds + later) for arrival in arrivals)]


class Figures(msgspec.Struct, frozen=True):
    """Latencies and times to the first token of some requests, in seconds, measured and predicted."""

    name: str
    requests: int
    latency: tuple[Spread, Spread]
    ttft: tuple[Spread, Spread]

    @property
    def errors(self) -> tuple[float, float]:
        """How far mean and P99 of the predicted latency are off, as a share of the measured ones."""
        measured, predicted = self.latency
        return predicted.mean / measured.mean - 1, predicted.p99 / measured.p99 - 1


def compare(recorded: Sequence[Seen], predicted: Sequence[Seen]) -> list[Figures]:
    """Figures of each service and of all together, which come last."""
    figures = []
    for name in sorted({request.service for request in recorded}):
        runs = [[r for r in run if r.service == name] for run in (recorded, predicted)]
        figures.append(_figures(name, *runs))
    return [*figures, _figures("all", recorded, predicted)]


def _figures(name: str, recorded: Sequence[Seen], predicted: Sequence[Seen]) -> Figures:
    measured, simulated = ([r for r in run if r.latency is not None] for run in (recorded, predicted))
    return Figures(
        name,
        len(measured),
        (_latencies(measured), _latencies(simulated)),
        (_first_tokens(measured), _first_tokens(simulated)),
    )


def _latencies(requests: Sequence[Seen]) -> Spread:
    return Spread.of([r.latency for r in requests if r.latency is not None])


def _first_tokens(requests: Sequence[Seen]) -> Spread:
    return Spread.of([r.ttft for r in requests if r.ttft is not None])


def table_of(figures: Sequence[Figures]) -> Table:
    """One line per service; each figure is measured, predicted, and how far the prediction is off."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("service")
    for column in ("requests", "mean latency s", "P99 latency s", "mean TTFT s", "P99 TTFT s"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in figures:
        cells = [_cell(a, b) for pair in (line.latency, line.ttft) for a, b in _mean_and_p99(*pair)]
        table.add_row(line.name, str(line.requests), *cells)
    return table


def _mean_and_p99(measured: Spread, predicted: Spread) -> list[tuple[float, float]]:
    return [(measured.mean, predicted.mean), (measured.p99, predicted.p99)]


def _cell(measured: float, predicted: float) -> str:
    return f"{measured:.2f} -> {predicted:.2f} ({predicted / measured - 1:+.0%})"

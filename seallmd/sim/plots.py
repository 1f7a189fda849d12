"""Charts of runs, as PNG files.

Owns how figures are drawn. Must not compute any: `sim.metrics` does. Needs matplotlib, which only
development installs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from seallmd.sim.experiment import Occupancy, Outcome
from seallmd.sim.metrics import SCALES, Report

Color = tuple[float, float, float, float] | str

_GIB = 1 << 30
_KV_COLOR, _CACHED_COLOR, _FREE_COLOR = "#303030", "#a0a0a0", "#f0f0f0"
_MOST_DEVICES = 16  # of one chart of memory


def latency_against_rate(reports: Sequence[Report], path: Path) -> None:
    """Normalized latency and P99 time per token of each run name over the request rate."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in _names(reports):
        own = sorted((r for r in reports if r.name == name), key=lambda r: r.rate)
        rates = [r.rate for r in own]
        left.plot(rates, [r.normalized_latency for r in own], marker="o", label=name)
        right.plot(rates, [r.overall.ms_per_token.p99 for r in own], marker="o", label=name)
    left.set_ylabel("normalized latency (mean slowdown)")
    right.set_ylabel("P99 latency per output token, ms")
    for axes in (left, right):
        axes.set_xlabel("requests per second")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def attainment(reports: Sequence[Report], path: Path) -> None:
    """Share of requests within k times their isolated latency, over k."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    several = len({report.rate for report in reports}) > 1
    for run in reports:
        label = f"{run.name}, {run.rate:g} req/s" if several else run.name
        axes.plot(list(SCALES), run.overall.attainment, marker=".", label=label)
    axes.set_xlabel("k")
    axes.set_ylabel("requests with latency ≤ k · T_iso")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def gantt(outcome: Outcome, services: Sequence[str], window: tuple[float, float], path: Path) -> None:
    """Which service steps on which device when; copies below the steps of their device, hatched."""
    devices = len(outcome.devices)
    figure = Figure(figsize=(12, 1.5 + 0.45 * devices), layout="constrained")
    axes = figure.subplots()
    colors = _colors(services)
    for device in range(devices):
        for kind, bottom, height, hatch in (("step", -0.1, 0.5, None), ("copy", -0.4, 0.25, "////")):
            spans = [s for s in outcome.spans if s.device == device and s.kind == kind]
            axes.broken_barh(
                [(s.began, s.ended - s.began) for s in spans],
                (device + bottom, height),
                facecolors=[colors[s.service] for s in spans],
                hatch=hatch,
            )
    axes.set_xlim(*window)
    axes.set_ylim(devices - 0.4, -0.6)
    axes.set_yticks(range(devices), [f"{i} {label}" for i, label in enumerate(outcome.devices)])
    axes.set_xlabel("seconds")
    seen = {span.service for span in outcome.spans}
    _legend(axes, {name: color for name, color in colors.items() if name in seen})
    figure.savefig(path, dpi=120)


def occupancy(outcome: Outcome, services: Sequence[str], path: Path) -> None:
    """What each arena holds over time: weights by service, KV, cached prefixes, free."""
    devices = sorted({sample.device for sample in outcome.occupancy})[:_MOST_DEVICES]
    columns = min(2, max(1, len(devices)))
    rows = max(1, math.ceil(len(devices) / columns))
    figure = Figure(figsize=(6.5 * columns + 1.5, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    seen = {name for sample in outcome.occupancy for name in sample.weights}
    colors = {name: color for name, color in _colors(services).items() if name in seen}
    for device, axes in zip(devices, grid.flat, strict=False):
        _fill_memory(axes, [s for s in outcome.occupancy if s.device == device], colors)
        axes.set_title(f"device {device}, {outcome.devices[device]}", fontsize="small", loc="left")
        axes.set_ylabel("GiB")
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    kinds: dict[str, Color] = {"KV": _KV_COLOR, "cached": _CACHED_COLOR, "free": _FREE_COLOR}
    _legend(grid[0][-1], {**colors, **kinds})
    figure.savefig(path, dpi=120)


def _fill_memory(axes: Axes, samples: Sequence[Occupancy], colors: dict[str, Color]) -> None:
    own = [name for name in colors if any(name in s.weights for s in samples)]
    layers = [[s.weights.get(name, 0) / _GIB for s in samples] for name in own]
    layers += [[s.kv / _GIB for s in samples], [s.cached / _GIB for s in samples]]
    layers += [[s.free / _GIB for s in samples]]
    axes.stackplot(
        [s.seconds for s in samples],
        layers,
        colors=[*(colors[name] for name in own), _KV_COLOR, _CACHED_COLOR, _FREE_COLOR],
        step="post",
    )
    axes.margins(0)


def _legend(axes: Axes, colors: dict[str, Color]) -> None:
    handles = [Patch(facecolor=color, edgecolor="#808080", label=name) for name, color in colors.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="x-small")


def _colors(names: Sequence[str]) -> dict[str, Color]:
    """One colour per name, told apart as well as 20 colours can."""
    palette = colormaps["tab20"]
    return {name: palette(index % 20) for index, name in enumerate(names)}


def _names(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(report.name for report in reports))

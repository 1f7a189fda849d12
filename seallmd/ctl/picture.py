"""The live parts of `seallmctl top`: sparklines, latencies, and the map of each arena.

Owns their glyphs and their memory of the last minute. Must not know sockets.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from seallmd.ctl.view import Record, plain_table

HISTORY = 60  # reports that are remembered
_NARROW = 80
_LEVELS = {"utf": " ▁▂▃▄▅▆▇█", "ascii": " .:-=+*#@"}
_COLOURS = ("blue", "green", "magenta", "cyan", "yellow", "red")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FREE = {"utf": "·", "ascii": "."}


class History:
    """Values of the last reports, by name."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))

    def add(self, name: str, value: float) -> None:
        """The newest value."""
        self._values[name].append(value)

    def of(self, name: str) -> Sequence[float]:
        """The oldest first."""
        return self._values[name]


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The last values as a line of bars, the highest one as high as can be."""
    levels = _LEVELS["ascii" if ascii_only else "utf"]
    last = list(values)[-width:]
    highest = max(last, default=0.0)
    top = len(levels) - 1
    # What is there at all is seen.
    bars = [levels[max(round(value / highest * top), value > 0)] if highest else levels[0] for value in last]
    return "".join(bars).rjust(width)


def traffic(out: Console, report: Record, picture: Record, history: History) -> RenderableType:
    """Services with their output, queue and latencies over time; those that nobody uses are left out."""
    table = plain_table()
    narrow = out.width < _NARROW  # then without the rare cases
    titles = ("SERVICE", "TOK/S", "", "WAIT", "", "FIRST p50", "p99", "NEXT p50", "p99")
    shown = [number for number, title in enumerate(titles) if not (narrow and title == "p99")]
    for number in shown:
        left = titles[number] in ("SERVICE", "")
        table.add_column(
            titles[number], justify="left" if left else "right", no_wrap=number > 0, overflow="fold"
        )
    plain, width = not _is_utf(out), 20 if out.width >= 110 else 10
    for service in report["services"]:
        name = service["name"]
        rates, queue = (f"{name}\0{what}" for what in ("rate", "queue"))
        history.add(rates, service["tokens_per_second"])
        history.add(queue, service["waiting"])
        latencies = picture["latencies"].get(name)
        if latencies is None and not any([*history.of(rates), *history.of(queue)]):
            continue
        cells: tuple[Text | str, ...] = (
            Text(name),
            f"{service['tokens_per_second']:.1f}",
            Text(sparkline(history.of(rates), width, ascii_only=plain), "green"),
            str(service["waiting"]),
            Text(sparkline(history.of(queue), width // 2, ascii_only=plain), "yellow"),
            *_percentiles(latencies, "first_token"),
            *_percentiles(latencies, "next_token"),
        )
        table.add_row(*(cells[number] for number in shown))
    return table if table.row_count else Text("nobody asks for anything", "dim")


def maps(out: Console, report: Record, picture: Record) -> list[RenderableType]:
    """Each arena from its first block to its last: capitals are weights, small letters KV."""
    services = [service["name"] for service in report["services"]]
    known = {name: number for number, name in enumerate(services)}
    free = _FREE["utf" if _is_utf(out) else "ascii"]
    lines: list[RenderableType] = []
    seen: set[str] = set()
    for arena in picture["maps"]:
        line = Text(f"{arena['device']:>3} ")
        for kind, service in arena["cells"]:
            if kind == "free" or service not in known:
                line.append(free, "dim")
                continue
            seen.add(service)
            letter = _LETTERS[known[service] % len(_LETTERS)]
            line.append(letter if kind in ("weights", "copying") else letter.lower(), _colour(known[service]))
        lines.append(line)
    legend = (
        Text(f"{_LETTERS[known[name] % len(_LETTERS)]} {name}", _colour(known[name]))
        for name in services
        if name in seen
    )
    return [*lines, Text("    ") + Text("  ").join([*legend, Text(f"{free} free", "dim")])]


def cells(out: Console) -> int:
    """How many cells of a map fit into a line."""
    return max(16, min(out.width - 5, 160))


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _percentiles(latencies: Record | None, what: str) -> tuple[str, str]:
    """P50 and P99, of what there is."""
    quantiles = latencies and latencies[what]
    if not quantiles:
        return "-", "-"
    p50, _, p99 = quantiles
    return _short(p50), _short(p99)


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _is_utf(out: Console) -> bool:
    return out.encoding.startswith("utf")

"""What people see: the status report and the progress of a load.

Owns tables, bars and wording. Must not know sockets: it gets the daemon's replies as plain dictionaries.
Colour is never the only carrier of a meaning.
"""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]

_PLAIN_WIDTH = 200  # columns when the output is no terminal: a file can be as wide as needed
_WIDE, _MEDIUM, _NARROW = 120, 90, 60
_BARS = {"utf": "█▓▒░", "ascii": "#=-."}
_BAR_STYLES = ("blue", "cyan", "green", "dim")
_STATE_STYLES = {
    "resident": "green",
    "up": "green",
    "refused": "red",
    "lost": "red",
    "copying": "yellow",
    "reading": "yellow",
    "probing": "yellow",
    "starting": "yellow",
    "draining": "yellow",
}


def console(*, stderr: bool = False) -> Console:
    """A console that follows the terminal's width, NO_COLOR and redirection."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_status(out: Console, report: Record) -> None:
    """Devices, services, and whatever needs a reason."""
    for part in status_parts(out, report):
        out.print(part)


def status_parts(out: Console, report: Record) -> list[RenderableType]:
    """The same, to be drawn by others. out: for its width and encoding."""
    services = report["services"]
    parts: list[RenderableType] = [
        _devices(out, report["devices"]),
        _legend(out),
        "",
        _services(out, services),
    ]
    parts += [
        f"\n[bold]{escape(service['name'])}[/]: {escape(service['reason'])}"
        for service in services
        if service["reason"]
    ]
    if report["draining"]:
        parts.append("\n[yellow]draining: no new requests are taken[/]")
    return parts


def plain_table() -> Table:
    """A table without lines, as all of ours are."""
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _devices(out: Console, devices: list[Record]) -> Table:
    table = plain_table()
    detailed = out.width >= _MEDIUM
    cells = 30 if out.width >= _WIDE else 12 if out.width >= _NARROW else 8
    table.add_column("DEVICE" if out.width >= _NARROW else "DEV", overflow="fold", min_width=3)
    table.add_column("STATE", no_wrap=True)
    if detailed:
        table.add_column("PID", justify="right", no_wrap=True)
    table.add_column("ARENA", no_wrap=True)
    for name in ("WEIGHTS", "KV", "FREE", "CACHED", "TOTAL") if detailed else ("FREE", "TOTAL"):
        table.add_column(name, justify="right", no_wrap=True)
    for device in devices:
        keys = ("weights", "kv", "free", "cached", "capacity") if detailed else ("free", "capacity")
        table.add_row(
            Text(f"{device['device']} {device['label']}" if out.width >= _NARROW else str(device["device"])),
            _device_state(device),
            *([str(device["pid"] or "-")] if detailed else []),
            _arena(device, cells, out),
            *(human_bytes(device[f"{key}_bytes"]) for key in keys),
        )
    return table


def _arena(device: Record, cells: int, out: Console) -> Text:
    """The arena as a bar: weights, KV, cached prefixes (free, but useful), free."""
    cached = device["cached_bytes"]
    parts = (device["weights_bytes"], device["kv_bytes"], cached, device["free_bytes"] - cached)
    whole = max(1, device["capacity_bytes"])
    bar, filled, seen = Text(), 0, 0
    for part, glyph, style in zip(parts, _glyphs(out), _BAR_STYLES, strict=True):
        seen += part
        end = round(cells * seen / whole)
        bar.append(glyph * (end - filled), style)
        filled = end
    return bar


def _legend(out: Console) -> Text:
    names = ("weights", "KV", "cached", "free")
    parts = zip(_glyphs(out), names, _BAR_STYLES, strict=True)
    return Text("  ").join(Text(f"{glyph} {name}", style) for glyph, name, style in parts)


def _glyphs(out: Console) -> str:
    return _BARS["utf" if out.encoding.startswith("utf") else "ascii"]


def _services(out: Console, services: list[Record]) -> Table:
    table = plain_table()
    columns = [column for column in _COLUMNS if out.width >= column[1]]
    for title, _, right, _ in columns:
        table.add_column(
            title, justify="right" if right else "left", no_wrap=title != "SERVICE", overflow="fold"
        )
    for service in services:
        table.add_row(*(cell(service) for *_, cell in columns))
    return table


def state_text(state: str) -> Text:
    """A state in its colour."""
    return Text(state, _STATE_STYLES.get(state, ""))


def _device_state(device: Record) -> Text:
    state = state_text(device["state"])
    return state.append(" drained", "yellow") if device["drained"] else state


def _service_state(service: Record) -> Text:
    state = state_text(service["state"])
    for flag in ("drained", "leaving"):
        if service[flag]:
            state.append(f" {flag}", "yellow")
    if service["stage"] is not None:
        state.append(f" {service['stage']:.0%}")
    return state


def _device(service: Record) -> str:
    """Devices of each replica; those of a tensor-parallel one are joined: 0+1,2+3."""
    return ",".join("+".join(map(str, group)) for group in service["groups"]) or "-"


def _swaps(service: Record) -> str:
    return f"{service['last_swap_seconds']:.3f} s" if service["swaps_in"] else "-"


def _leaves(service: Record) -> str:
    """When it leaves for being idle."""
    seconds = service["expires_seconds"]
    return "-" if seconds is None else f"{seconds:.0f} s"


# Title, the terminal width from which it is shown, whether it is a number, and its cell.
_COLUMNS: tuple[tuple[str, int, bool, Any], ...] = (
    ("SERVICE", 0, False, lambda s: Text(s["name"])),
    ("STATE", 0, False, _service_state),
    ("DEV", 50, True, _device),
    ("RUN", 0, True, lambda s: str(s["running"])),
    ("WAIT", 0, True, lambda s: str(s["waiting"])),
    ("TOK/S", _NARROW, True, lambda s: f"{s['tokens_per_second']:.1f}"),
    ("WEIGHTS", 70, True, lambda s: human_bytes(s["weights_bytes"])),
    ("KV", 80, True, lambda s: human_bytes(s["kv_bytes"])),
    ("CONTEXT", _MEDIUM, True, lambda s: str(s["context"])),
    ("PINNED", 100, False, lambda s: "yes" if s["pinned"] else "-"),
    ("LEAVES", 115, True, _leaves),
    ("DTYPE", 105, False, lambda s: s["dtype"]),
    ("PREEMPTED", _WIDE, True, lambda s: str(s["preemptions"])),
    ("LAST SWAP", _WIDE, True, _swaps),
)


class _BarView:
    """A bar while the context lasts, on a terminal; nothing elsewhere."""

    def __init__(self, out: Console, text: str) -> None:
        self._out = out
        columns = (TextColumn(text), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=out, transient=True)

    def __enter__(self) -> Self:
        if self._out.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._out.is_terminal:
            self._bar.stop()


class CountView(_BarView):
    """Counts up to a known number: a bar on a terminal, nothing elsewhere."""

    def __init__(self, out: Console, what: str, total: int) -> None:
        super().__init__(out, "{task.completed:.0f} of {task.total:.0f} {task.description}")
        self._task = self._bar.add_task(what, total=total)

    def told(self, count: int) -> None:
        """So many are done."""
        self._bar.update(self._task, completed=count)


class JobView(_BarView):
    """Follows one command: a moving bar on a terminal, plain lines elsewhere."""

    def __init__(self, out: Console, service: str) -> None:
        super().__init__(out, "{task.description}")
        self._service = service
        self._said = ""
        self._task = self._bar.add_task(escape(service), total=None)

    def told(self, reply: Record) -> None:
        """Show one progress reply."""
        state, stage = reply["state"], reply["stage"]
        if self._out.is_terminal:
            total = None if stage is None else 1.0
            text = f"{escape(self._service)}: {state}"
            self._bar.update(self._task, description=text, total=total, completed=stage or 0.0)
            return
        # In a log, a line for every tenth is enough.
        line = f"{self._service}: {state}" + ("" if stage is None else f" {int(stage * 10) * 10}%")
        if line != self._said:
            self._out.print(Text(line))
            self._said = line

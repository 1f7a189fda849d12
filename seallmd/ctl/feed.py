"""What people see of events and of load tests.

Owns their lines and tables. Must not know sockets.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from seallmd.ctl.details import human_seconds
from seallmd.ctl.view import Record, plain_table

_STYLES = {"operator": "cyan", "configuration": "magenta", "request": "dim", "service": ""}


def show_event(out: Console, event: Record) -> None:
    """One line: when, what kind, whom it concerns, what happened."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    whom = f"{event['service']}: " if event["service"] else ""
    kind = Text(f"{event['kind']:<13}", _STYLES.get(event["kind"], ""))
    out.print(Text.assemble(f"{clock}  ", kind, f"  {whom}{event['text']}"), soft_wrap=True)


def show_bench(out: Console, report: Record) -> None:
    """Throughput and latencies over all and by service, and what went wrong."""
    table = plain_table()
    titles = (
        "SERVICE",
        "REQUESTS",
        "FAILED",
        "REQ/S",
        "TOK/S",
        "FIRST p50",
        "p99",
        "NEXT p50",
        "p99",
        "WHOLE p50",
    )
    for title in (*titles, "p99"):
        table.add_column(title, justify="left" if title == "SERVICE" else "right", no_wrap=title != "SERVICE")
    rows: dict[str, Any] = dict(report["services"])
    if len(rows) > 1:
        rows["(all)"] = report["total"]
    for name, figures in rows.items():
        spreads = [figures[key] for key in ("first_token", "between_tokens", "whole")]
        table.add_row(
            Text(name),
            str(figures["requests"]),
            str(figures["failed"]),
            f"{figures['requests_per_second']:.2f}",
            f"{figures['output_tokens_per_second']:.1f}",
            *(_seconds(spread, key) for spread in spreads for key in ("p50", "p99")),
        )
    out.print(table)
    load = report["load"]
    out.print(
        f"{load['clients']} clients, {load['prompt_tokens']} + {load['output_tokens']} tokens each, "
        f"{report['seconds']:.1f} s"
    )
    for error in report["errors"]:
        out.print(f"[red]failed[/]: {escape(error)}")


def _seconds(spread: Record | None, key: str) -> str:
    if spread is None:
        return "-"
    seconds = spread[key]
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else human_seconds(seconds)

"""seallmctl top: the report, drawn again and again until somebody presses q.

Owns the screen and the keyboard while it runs. Must not know sockets: it gets a function that asks.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from seallmd.ctl import view
from seallmd.errors import Unreachable

_QUIT = (b"q", b"Q", b"\x04")


def run(out: Console, ask: Callable[[], view.Record], seconds: float) -> None:
    """Draw what `ask` reports every so many seconds; once, where there is no terminal. Raises Unreachable."""
    report = ask()
    if not (out.is_terminal and sys.stdin.isatty()):
        out.print(frame(out, report))
        return
    with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as live:
        drawn = frame(out, report)
        while True:
            live.update(drawn, refresh=True)
            if pressed(seconds) in _QUIT:
                return
            try:
                drawn = frame(out, ask())
            except Unreachable as error:  # it may be restarted: keep looking
                drawn = Group(Text(str(error), "yellow"), "", "q quits")


def frame(out: Console, report: view.Record) -> RenderableType:
    """One picture: a line of sums, devices, services."""
    services = report["services"]
    running, waiting = (sum(service[key] for service in services) for key in ("running", "waiting"))
    rate = sum(service["tokens_per_second"] for service in services)
    sums = f"[bold]{rate:.1f}[/] tokens/s, [bold]{running}[/] running, [bold]{waiting}[/] waiting"
    clock = time.strftime("%H:%M:%S")
    return Group(
        f"seallmd {report['daemon']['version']}  {clock}  {sums}", "", *view.status_parts(out, report)
    )


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Keys without Enter; gives a function that waits for one so many seconds. The terminal is restored."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)

    def pressed(seconds: float) -> bytes:
        ready, _, _ = select.select([keyboard], [], [], seconds)
        # An end of input (the terminal is gone) is a reason to stop.
        return (os.read(keyboard, 1) or b"q") if ready else b""

    try:
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)

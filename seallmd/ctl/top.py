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

from seallmd.ctl import picture, view
from seallmd.errors import Unreachable

_QUIT = (b"q", b"Q", b"\x04")


Ask = Callable[[int], tuple[view.Record, view.Record]]


def run(out: Console, ask: Ask, seconds: float) -> None:
    """Draw what `ask` reports every so many seconds; once, where there is no terminal. Raises Unreachable.

    ask: gets how many cells a map may have; gives the status, and the maps with the latencies.
    """
    history = picture.History()

    def draw() -> RenderableType:
        return frame(out, *ask(picture.cells(out)), history)

    first = draw()
    if not (out.is_terminal and sys.stdin.isatty()):
        out.print(first)
        return
    with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as live:
        drawn = first
        while True:
            live.update(drawn, refresh=True)
            if pressed(seconds) in _QUIT:
                return
            try:
                drawn = draw()
            except Unreachable as error:  # it may be restarted: keep looking
                drawn = Group(Text(str(error), "yellow"), "", "q quits")


def frame(
    out: Console, report: view.Record, pictures: view.Record, history: picture.History
) -> RenderableType:
    """One picture: a line of sums, traffic, devices with their maps, services."""
    services = report["services"]
    running, waiting = (sum(service[key] for service in services) for key in ("running", "waiting"))
    rate = sum(service["tokens_per_second"] for service in services)
    sums = f"[bold]{rate:.1f}[/] tokens/s, [bold]{running}[/] running, [bold]{waiting}[/] waiting"
    clock = time.strftime("%H:%M:%S")
    return Group(
        f"seallmd {report['daemon']['version']}  {clock}  {sums}",
        "",
        picture.traffic(out, report, pictures, history),
        "",
        *picture.maps(out, report, pictures),
        "",
        *view.status_parts(out, report),
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

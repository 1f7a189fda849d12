"""seallmctl on a terminal of its own, as a person would start it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import termios


async def start(theirs: int, term: str, *arguments: str) -> asyncio.subprocess.Process:
    """Start seallmctl with `theirs`, one end of a pty, as its controlling terminal of kind `term`."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "seallmd.ctl.main", *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": term},
        preexec_fn=_own_terminal,
    )


def _own_terminal() -> None:
    """In the child: Ctrl-C on the terminal counts, even where whoever runs the tests ignores it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Parts of a long run on a device, of which one that fails costs the others nothing.

An error ends its own part. What ends the process (a fault of the device, a signal, a part that hangs) ends
its section too: those behind it go on in a process of their own.
"""

from __future__ import annotations

import faulthandler
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def survives(name: str, part: Callable[[], bool]) -> bool:
    """What a part returns, whether it was right; False after an error, which is printed.

    Raises AcceleratorError: the device is lost to this process.
    """
    try:
        return part()
    except torch.AcceleratorError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the other parts are to be seen
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        print(f"  {name}: FAILED, {type(error).__name__} in {where}: {error}")
        return False


def run_here(
    names: Sequence[str], run: Callable[[str], bool], told: Callable[[bool], object], limit_seconds: float = 0
) -> bool:
    """Run sections one after the other; whether all were right. told: hears of each that has ended.

    limit_seconds: a section that takes longer ends the process, and says where it was; 0: none does.
    """
    good = True
    for name in names:
        if limit_seconds:
            faulthandler.dump_traceback_later(limit_seconds, exit=True)
        right = survives(name, lambda name=name: run(name))  # type: ignore[misc]  # bound at once
        told(right)
        good &= right
    faulthandler.cancel_dump_traceback_later()
    return good


def run_in_processes(
    names: Sequence[str], command: Callable[[Sequence[str]], Sequence[str]], report: Path, seconds: float
) -> bool:
    """Run sections in processes, a new one behind each that ended its process; whether all were right.

    command: runs the sections that it is given, and appends a line to `report` for each that has ended:
    "good" or "bad". seconds: for all together.
    """
    left, good, until = list(names), True, time.monotonic() + seconds
    while left:
        report.write_text("")
        try:
            code = subprocess.run(command(left), check=False, timeout=until - time.monotonic()).returncode
            end = f"it ended its process with {code}"
        except subprocess.TimeoutExpired:
            end = f"the {seconds:.0f} s for all sections are over"
        ended = report.read_text().split()
        good &= "bad" not in ended
        left = left[len(ended) :]
        if left:
            print(f"{left.pop(0)}: FAILED, {end}", flush=True)
            good = False
    return good

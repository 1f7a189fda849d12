"""The short form of `python -m tests.chaos.storm`: two dozen faults through the real daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.chaos import faults
from tests.chaos.storm import Storm


def test_a_short_storm(tmp_path: Path) -> None:
    """After each fault nothing is held, nothing is left over, and every answer was right or promised."""
    storm = Storm(tmp_path, seed=7)
    try:
        asyncio.run(storm.run(24))
    finally:
        storm.daemon.kill()
    assert sum(storm.counts.values()) == 24
    assert storm.traffic.outcomes["right"] > 50


def test_every_fault_can_come() -> None:
    """A fault that is in the module but not in the table would never be tried."""
    of_module = {
        name
        for name, value in vars(faults).items()
        if asyncio.iscoroutinefunction(value) and not name.startswith("_")
    }
    assert of_module == {fault.__name__ for fault in faults.FAULTS}

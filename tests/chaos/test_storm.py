"""The short form of `python -m tests.chaos.storm`: one round of every fault through the real daemon."""

from __future__ import annotations

import asyncio
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos import faults, phases
from tests.chaos.storm import FAULTS, PHASES, ROUND, Storm, deck


@pytest.mark.timeout(1800)
def test_a_short_storm(tmp_path: Path) -> None:
    """After each fault nothing is held, nothing is left over, and every answer was right or promised."""
    storm = Storm(tmp_path, seed=7)
    try:
        asyncio.run(storm.run(ROUND))
    finally:
        storm.daemon.kill()
    assert set(storm.counts) == {fault.__name__ for fault in FAULTS}
    assert set(+storm.phases) == set(PHASES)
    assert storm.traffic.outcomes["right"] > 50


def test_every_fault_comes_up() -> None:
    """In each round; a fault that is in a module but not in the table would never be tried."""
    of_modules = {
        name
        for module in (faults, phases)
        for name, value in vars(module).items()
        if asyncio.iscoroutinefunction(value) and not name.startswith("_")
    }
    assert of_modules == {fault.__name__ for fault in FAULTS}
    cards = deck(3)
    for _ in range(3):
        assert set(islice(cards, ROUND)) == set(FAULTS)


def test_a_seed_gives_the_same_faults() -> None:
    """In the same order; another seed gives another one."""
    first, again, other = (list(islice(deck(seed), 2 * ROUND)) for seed in (1, 1, 2))
    assert first == again
    assert first != other

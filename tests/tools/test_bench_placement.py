"""The tool that measures planning: it runs, and its yardstick is complete."""

from __future__ import annotations

import sys

import pytest

from seallmd.core.plan import Machine, broken
from tools.bench_placement import all_plans, main, service


def test_all_plans_are_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the yardstick: a plan that is left out would flatter the search."""
    machine = Machine((80 << 30,) * 2, copy_bytes_per_second=1e10)
    demands = [service("a", 1.0, billions=8, prompt=100, output=100, arena=80 << 30)]
    found = {plan.of("a") for plan in all_plans(demands, machine)}
    assert found == {(), ((0,),), ((1,),), ((0, 1),), ((0,), (1,))}
    assert not any(broken(plan, demands, machine) for plan in all_plans(demands, machine))
    monkeypatch.setattr(sys, "argv", ["bench", "--cases", "3", "--services", "2", "--no-large"])
    main()
    assert "one_each" in capsys.readouterr().out

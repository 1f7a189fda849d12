"""The tool that measures planning: it runs, and its yardstick is complete."""

from __future__ import annotations

import sys

import pytest

from seallmd.core.plan import broken
from tools.bench_placement import all_plans, draw, main


def test_all_plans_are_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the yardstick: a plan that is left out would flatter the search."""
    demands, machine = draw(5, 2, 1, load=0.1)
    assert [split.ranks for split in demands[0].splits][:2] == [1, 2]
    found = {plan.of("service-0") for plan in all_plans(demands, machine)}
    assert found == {(), ((0,),), ((1,),), ((0, 1),), ((0,), (1,))}
    assert not any(broken(plan, demands, machine) for plan in all_plans(demands, machine))
    monkeypatch.setattr(sys, "argv", ["bench", "--cases", "3", "--services", "2", "--no-large"])
    main()
    assert "one_each" in capsys.readouterr().out

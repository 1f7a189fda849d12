"""How steps that overlap are told from those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench_contention import Ran, main, pooled, slowdowns


def ran(device: int, began: float, seconds: float, expected: float = 1.0) -> Ran:
    return Ran(device, ("chat", "decode"), began, began + seconds, seconds, expected)


def test_steps_beside_another_are_compared_with_those_alone() -> None:
    """Protects the coefficient: half as fast together is a contention of 1, whatever costs were learnt."""
    alone = [ran(0, 10.0 * i, 1.2) for i in range(6)]
    together = [ran(device, 100 + 10.0 * i, 2.4) for i in range(3) for device in (0, 1)]
    between = [ran(0, 200.0, 9.0), ran(1, 204.0, 9.0)]  # half of each: neither
    (found,) = slowdowns([*alone, *together, *between])
    assert (found.alone_steps, found.together_steps) == (6, 6)
    assert found.factor == pytest.approx(2.0)
    assert pooled([found]) == pytest.approx(1.0)


def test_too_few_steps_say_nothing() -> None:
    """Protects against a coefficient of one lucky step."""
    assert slowdowns([ran(0, 10.0 * i, 1.0) for i in range(9)]) == []


def test_a_missing_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, no traceback."""
    assert main([str(tmp_path / "run")]) == 2
    assert "bench_contention: run.profiles" in capsys.readouterr().err

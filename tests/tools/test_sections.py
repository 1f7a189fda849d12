"""Parts of a long run: what happens to the others when one fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tools.sections import run_here, run_in_processes, survives

# Ends each of its sections well, but "bad" ones badly, and "dead" ones not at all; "slow" ones take long.
_CHILD = """
import os, sys, time
for name in sys.argv[2:]:
    print(name, flush=True)
    if name == "dead":
        os.kill(os.getpid(), 9)
    if name == "slow":
        time.sleep(60)
    with open(sys.argv[1], "a") as file:
        file.write("bad\\n" if name == "bad" else "good\\n")
"""


def child(report: Path) -> Callable[[Sequence[str]], list[str]]:
    return lambda names: [sys.executable, "-c", _CHILD, str(report), *names]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit("no"), RuntimeError("no")])
def test_an_error_ends_its_own_part(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told with its place, and the next ones run."""

    def run(name: str) -> bool:
        if name == "b":
            raise error
        return name != "c"

    told: list[bool] = []
    assert not run_here(["a", "b", "c", "d"], run, told.append)
    assert told == [True, False, False, True]
    assert f"b: FAILED, {type(error).__name__} in test_sections.py:" in capsys.readouterr().out


def test_a_lost_device_ends_the_process() -> None:
    """Nothing else can be had in it."""

    def lost() -> bool:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        survives("a", lost)


@pytest.mark.parametrize(
    ("names", "good", "printed"),
    [
        (["a", "b"], True, ["a", "b"]),
        (["a", "dead", "b", "dead"], False, ["a", "dead", "b", "dead"]),
        (["bad", "a"], False, ["bad", "a"]),
        (["dead"], False, ["dead"]),
    ],
)
def test_sections_behind_one_that_ends_the_process(
    names: list[str], good: bool, printed: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They run in another."""
    report = tmp_path / "report"
    assert run_in_processes(names, child(report), report, 60) is good
    out = capfd.readouterr().out.splitlines()
    assert [line for line in out if "FAILED" not in line] == printed
    assert sum("FAILED, it ended its process with -9" in line for line in out) == names.count("dead")


def test_time_is_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every section that did not end is named."""
    report = tmp_path / "report"
    assert not run_in_processes(["a", "slow", "b"], child(report), report, 1)
    out = capfd.readouterr().out
    assert "slow: FAILED, the 1 s" in out
    assert "b: FAILED, the 1 s" in out

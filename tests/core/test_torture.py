"""Histories of every shape, and the tool that shrinks those that fail."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from seallmd.core.ranks import Ranks
from tests.core import torture
from tests.core.torture import Action, Case

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_a_million_events(tmp_path: Path) -> None:
    """Histories of many shapes, in as many processes as there are cores; what fails is shrunk to a file."""
    command = (
        sys.executable,
        "-m",
        "tests.core.torture",
        "--events",
        "1000000",
        "--out",
        tmp_path / "f.json",
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = tmp_path / "f.json"
    assert done.returncode == 0, done.stderr + (found.read_text() if found.exists() else "")
    assert int(done.stdout.split()[0]) >= 1_000_000


def test_a_history_is_the_same_again() -> None:
    """Also when it went through a file."""
    case = torture.make(3, actions=120)
    assert torture.play(case) == torture.play(Case.from_json(case.to_json()))


def test_a_failure_is_shrunk_to_its_cause() -> None:
    """Of a thousand actions, the two that matter remain."""
    actions = [("wait", seed) for seed in range(1000)]
    guilty = {("wait", 100), ("wait", 777)}

    def fails(left: Sequence[Action]) -> bool:
        return guilty <= set(left)

    assert set(torture.shrink(actions, fails, time.monotonic() + 60)) == guilty


def test_a_failing_history_is_shrunk_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a defect put into the ledger, the tool finds it, and what it writes fails again."""

    def forget_to_release(self: Ranks, tables: object) -> None:
        """Blocks of requests that end are lost."""

    monkeypatch.setattr(Ranks, "release", forget_to_release)
    out = tmp_path / "failing.json"
    torture._write_shrunk(torture.make(0, actions=150), out)
    assert "shrunk to" in capsys.readouterr().err
    found = Case.from_json(out.read_text())
    assert len(found.actions) < 15
    assert torture.failure(found)

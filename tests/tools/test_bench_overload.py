"""The overload benchmark: a short run on a tiny model, and that a limit shows in its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.helpers import save_tiny
from tools import bench_overload


def test_a_short_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is refused without a limit, and nothing ends otherwise than served or refused."""
    monkeypatch.setattr(bench_overload, "TOKENS", (3, 96))
    arguments = [str(save_tiny(tmp_path / "m")), "--limits", "0", "0.2", "--threads", "1"]
    assert bench_overload.main([*arguments, "--seconds", "0.3", "--times", "2"]) == 0, capsys.readouterr().err
    unlimited, limited = capsys.readouterr().out.splitlines()
    assert "max_wait_seconds = 0:" in unlimited
    assert "; 0 refused" in unlimited
    assert "max_wait_seconds = 0.2:" in limited
    assert "; 0 wrong" in limited

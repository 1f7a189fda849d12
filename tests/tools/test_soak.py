"""The soak: that it finds what grows, and a short one that finds nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.worker.helpers import save_tiny
from tools import soak
from tools.soak import MIB, Sample, Soak


def run_of(daemon: list[int], rest: tuple[int, int] = (20, 10)) -> Soak:
    """A run whose daemon had these sizes in MiB."""
    found = Soak([Sample(float(i), size * MIB, 500 * MIB) for i, size in enumerate(daemon)])
    found.outcomes["well"] = 1
    found.rest = [(20, 10), rest]
    return found


def test_growth_is_found() -> None:
    """A warm-up is none; a steady leak is, and so are descriptors, tasks and errors without a reason."""
    assert run_of([50, 200, 300] + [320] * 20).troubles() == []
    assert "daemon" in run_of(list(range(300, 400, 2))).troubles()[0]
    assert "tasks" in run_of([300] * 20, rest=(20, 30)).troubles()[0]
    assert "descriptors" in run_of([300] * 20, rest=(40, 10)).troubles()[0]
    failed = run_of([300] * 20)
    failed.unexplained.append("500 something")
    assert "500 something" in failed.troubles()[0]


def test_a_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two minutes, three tiny models of which two fit: everything of the long one but its length."""
    config = '[http]\nport = 0\n[devices]\nkind = "cpu"\ncpu_workers = 1\nthreads = 1\n'
    config += 'memory = "512 KiB"\nblock = "8 KiB"\n'
    config += "[policy]\npatience_seconds = 0.3\nmin_residency_swaps = 2\n"
    for name in ("a", "b", "c"):
        save_tiny(tmp_path / name)
        config += f'[[service]]\nname = "{name}"\nmodel = "{tmp_path / name}"\n'
    file = tmp_path / "seallmd.toml"
    file.write_text(config)
    assert soak.main(["--config", str(file), "--minutes", "2"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    figures = json.loads(out[out.index("{") :])
    assert figures["unexplained"] == 0
    assert figures["outcomes"]["well"] > 10

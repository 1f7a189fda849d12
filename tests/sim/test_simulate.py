"""The command `tools/simulate.py`, whole, with its charts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.simulate import main

SMALL = ["--models", "cpu", "--devices", "cpu", "--seconds", "8", "--prompt", "40", "--output", "10"]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height out of the header of a PNG file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 5000
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_compares_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the command as documented: table, JSON, and one chart of each kind."""
    figures, plots = tmp_path / "figures.json", tmp_path / "plots"
    output = ["--json", str(figures), "--plots", str(plots), "--services"]
    assert main([*SMALL, "--rate", "0.5,1", "--policy", "budget,dedicated", *output]) == 0
    text = capsys.readouterr().out
    assert text.count("dedicated") == 4  # two lines, and the titles of two tables of services
    reports = json.loads(figures.read_bytes())["reports"]
    assert [(r["name"], r["rate"]) for r in reports] == [
        ("budget", 0.5),
        ("dedicated", 0.5),
        ("budget", 1.0),
        ("dedicated", 1.0),
    ]
    names = {path.name for path in plots.iterdir()}
    assert names >= {"latency.png", "attainment.png", "gantt-budget-1.png", "memory-dedicated-0.5.png"}
    for path in plots.iterdir():
        width, height = png_size(path)
        assert width > 400
        assert height > 150


def test_runs_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects --trace."""
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{n},{20 + n},{5}\n" for n in range(10))
    trace.write_text(f"seconds,prompt_tokens,output_tokens\n{rows}")
    assert main([*SMALL, "--trace", str(trace), "--policy", "fcfs"]) == 0
    assert "fcfs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [["--models", "gpt-9"], ["--devices", "abacus"], ["--policy", "luck"], ["--trace", "nowhere.csv"]],
)
def test_what_cannot_be_done_is_said(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Protects people from tracebacks."""
    assert main([*SMALL, *wrong]) == 2
    assert capsys.readouterr().err.startswith("simulate: ")

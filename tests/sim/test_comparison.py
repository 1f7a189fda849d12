"""Predictions beside what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.profile import ServiceProfile
from seallmd.sim import comparison, experiment, metrics
from seallmd.sim.experiment import Setup
from seallmd.sim.metrics import Seen
from seallmd.sim.models import SimError, parse_models
from seallmd.sim.workload import Lengths, synthetic
from tools.simulate import main

MODELS = "chat=smollm2-135m,code=gemma-3-270m"


def recorded_run(profiles: dict[str, ServiceProfile]) -> list[Seen]:
    """A run as a client would have recorded it, served by the simulator itself."""
    shapes = parse_models(MODELS)
    arrivals = synthetic(list(shapes), rate=0.5, seconds=20, alpha=0.0, seed=1, lengths=Lengths(60, 20))
    devices = (ROOFLINES["cpu"],)
    return metrics.seen(experiment.run(Setup(shapes, devices, arrivals, profiles=profiles)).served)


def profiles(slower: float) -> dict[str, ServiceProfile]:
    """Costs of devices that are `slower` than the roofline says."""
    found = {}
    for name, shape in parse_models(MODELS).items():
        costs = StepCosts.guess(ROOFLINES["cpu"], shape)
        fixed, rows, context = costs.decode
        costs.decode = (fixed * slower, rows * slower, context * slower)
        costs.prompt *= slower
        found[name] = ServiceProfile(costs)
    return found


def test_the_same_devices_give_the_same_latencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the whole path of the command: recording and profiles in, predictions out, nothing off."""
    recorded, costs = recorded_run(profiles(3.0)), profiles(3.0)
    recording, learnt = tmp_path / "report.json", tmp_path / "profiles.json"
    recording.write_bytes(msgspec.json.encode({"requests": recorded}))
    learnt.write_bytes(msgspec.json.encode({name: {"profile": p} for name, p in costs.items()}))
    files = ["--compare", str(recording), "--profiles", str(learnt)]
    assert main([*files, "--models", MODELS, "--devices", "cpu", "--policy", "budget"]) == 0
    text = capsys.readouterr().out
    assert "measured -> predicted (budget)" in text
    assert len(re.findall(r"\([+-]0%\)", text)) == 3 * 4  # two services and all: mean and P99 of each


def test_steps_take_as_long_as_was_learnt() -> None:
    """Protects the use of profiles: without them this device would be three times as fast."""
    slow, fast = recorded_run(profiles(3.0)), recorded_run({})
    (*_, everything) = comparison.compare(slow, fast)
    assert everything.errors[0] < -0.6


def test_figures_by_hand() -> None:
    """Protects the arithmetic, and that failed requests count nowhere."""
    measured = [Seen("a", 0.0, 5, 5, 2.0, 1.0), Seen("a", 1.0, 5, 5, None, None)]
    predicted = [Seen("a", 0.0, 5, 5, 3.0, 0.5)]
    service, everything = comparison.compare(measured, predicted)
    assert (service.name, service.requests, everything.requests) == ("a", 1, 1)
    assert service.errors == (pytest.approx(0.5), pytest.approx(0.5))
    assert len(comparison.arrivals_of(measured)) == 1


def test_a_warm_up_comes_before() -> None:
    """Protects runs that were warmed up: the same requests first, and then all as they were recorded."""
    recorded = [Seen("a", float(n), 5 + n, 5, 1.0, 0.5) for n in range(3)]
    first, second, *measured = comparison.arrivals_of(recorded, warm_up=2)
    assert [first, second] == comparison.arrivals_of(recorded)[:2]
    later = measured[0].seconds
    assert later > second.seconds
    assert [(a.seconds - later, a.prompt) for a in measured] == [(0.0, 5), (1.0, 6), (2.0, 7)]


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"requests": [1]}'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """Protects people from tracebacks."""
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(SimError):
        comparison.read_recording(path)


def test_services_nobody_named_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects against a comparison that leaves out half of the load."""
    recording = tmp_path / "report.json"
    recording.write_bytes(msgspec.json.encode({"requests": [Seen("other", 0.0, 5, 5, 1.0, 1.0)]}))
    assert main(["--compare", str(recording), "--models", MODELS, "--devices", "cpu"]) == 2
    assert "other" in capsys.readouterr().err

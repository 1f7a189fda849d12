"""What was learnt of services outlives the daemon, and only where it still holds."""

from __future__ import annotations

from pathlib import Path

from seallmd.core.cost import ROOFLINES, StepCosts
from seallmd.core.profile import ServiceProfile
from seallmd.core.settings import ServiceSettings
from seallmd.runtime import profiles
from tests.core.helpers import shape

SERVICE = ServiceSettings(name="a", model="m")


def profile() -> ServiceProfile:
    learnt = ServiceProfile(StepCosts.guess(ROOFLINES["cpu"], shape()))
    learnt.ended(prompt=10, output=20)
    return learnt


def test_saved_profiles_are_loaded_for_the_same_service(tmp_path: Path) -> None:
    """The same model on the same kind of device knows what it learnt; another starts anew."""
    path = tmp_path / "cache" / "profiles.json"
    profiles.save(path, [SERVICE], "cpu", {"a": profile()})
    assert profiles.load(path, [SERVICE], "cpu") == {"a": profile()}
    assert profiles.load(path, [SERVICE], "h200") == {}
    assert profiles.load(path, [ServiceSettings(name="a", model="other")], "cpu") == {}
    assert [entry.name for entry in path.parent.iterdir()] == ["profiles.json"], "a partial file stayed"


def test_a_broken_file_is_as_good_as_none(tmp_path: Path) -> None:
    """Nothing depends on it."""
    path = tmp_path / "profiles.json"
    path.write_text("{ this is no JSON")
    assert profiles.load(path, [SERVICE], "cpu") == {}
    profiles.save(tmp_path / "profiles.json" / "impossible", [SERVICE], "cpu", {"a": profile()})

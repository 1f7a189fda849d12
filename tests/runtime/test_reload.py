"""What a running daemon makes of a changed configuration."""

from __future__ import annotations

from msgspec.structs import replace

from seallmd.config import LIVE, Config, DeviceSettings, LogSettings, reloaded
from seallmd.core.settings import ServiceSettings

A, B = ServiceSettings(name="a", model="m"), ServiceSettings(name="b", model="m")
OLD = Config(service=(A,))


def test_an_equal_file_changes_nothing() -> None:
    """Nor does it ask for a restart."""
    assert reloaded(OLD, Config(service=(A,))) == (OLD, [], [])


def test_every_live_setting_is_taken_over() -> None:
    """What the list promises, the running configuration has."""
    new = replace(OLD, stop_seconds=1.0, hung_seconds=2.0, log=LogSettings(level="debug", format="json"))
    config, changed, waiting = reloaded(OLD, new)
    assert config == new
    assert sorted(changed) == sorted(LIVE)
    assert waiting == []


def test_what_needs_a_restart_stays_as_it_was() -> None:
    """And is named again at the next reload, until the restart."""
    log = LogSettings(level="debug", stall_seconds=2.0)
    new = replace(OLD, service=(replace(A, pinned=True), B), devices=DeviceSettings(threads=3), log=log)
    config, changed, waiting = reloaded(OLD, new)
    assert config == replace(OLD, log=LogSettings(level="debug"))
    assert changed == ["log.level"]
    assert waiting == ["devices.threads", "log.stall_seconds", "service a", "service b"]
    assert reloaded(config, new)[1:] == ([], waiting)

"""What a running daemon makes of a changed configuration."""

from __future__ import annotations

from msgspec.structs import replace

from seallmd.api.settings import HttpSettings
from seallmd.config import LIVE, Config, DeviceSettings, LogSettings, reloaded
from seallmd.core.settings import GroupSettings, PolicySettings, ReplacementSettings, ServiceSettings

A, B = ServiceSettings(name="a", model="m"), ServiceSettings(name="b", model="m")
OLD = Config(service=(A,))


def test_an_equal_file_changes_nothing() -> None:
    """Nor does it ask for a restart."""
    assert reloaded(OLD, Config(service=(A,))) == (OLD, [], [])


def test_every_live_setting_is_taken_over() -> None:
    """What the list promises, the running configuration has."""
    new = Config(
        service=(replace(A, pinned=True), B),
        group=(GroupSettings(services=("a", "b"), share_members=False),),
        stop_seconds=1.0,
        hung_seconds=2.0,
        log=LogSettings(level="debug", format="json"),
        http=HttpSettings(keys="keys.toml"),
        replacement=ReplacementSettings(
            enabled=False, min_interval_seconds=1.0, max_interval_seconds=2.0, drift=3.0, least_gain=0.5
        ),
        policy=PolicySettings(
            scheduler="fcfs",
            max_gap_rounds=2.0,
            ageing=1.0,
            step_tokens=64,
            max_rows=8,
            batch_slowdown=2.0,
            prefix_reuse=False,
            replicate=False,
            replicate_gain=2.0,
            replicate_seconds=2.0,
            migrate=False,
            migrate_gain=2.0,
            split_efficiency=0.5,
            min_residency_swaps=1.0,
            patience_seconds=1.0,
            max_waiting_tokens=99,
        ),
    )
    config, changed, waiting = reloaded(OLD, new)
    assert config == new
    assert sorted(changed) == sorted([*LIVE, "service a", "service b", "group"])
    assert waiting == []


def test_what_needs_a_restart_stays_as_it_was() -> None:
    """And is named again at the next reload, until the restart."""
    log = LogSettings(level="debug", stall_seconds=2.0)
    policy = PolicySettings(pipeline_depth=1, scheduler="dedicated", ageing=1.0)
    new = replace(OLD, devices=DeviceSettings(threads=3), log=log, policy=policy)
    config, changed, waiting = reloaded(OLD, new)
    assert config == replace(OLD, log=LogSettings(level="debug"), policy=PolicySettings(ageing=1.0))
    assert changed == ["policy.ageing", "log.level"]
    assert waiting == [
        *("devices.threads", "policy.scheduler", "policy.pipeline_depth", "log.stall_seconds"),
    ]
    assert reloaded(config, new)[1:] == ([], waiting)

"""A configuration that was read again: what holds stays, what changed changes, nobody is cut off."""

from __future__ import annotations

from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core.settings import GroupSettings, PolicySettings, ServiceSettings
from tests.core.helpers import Recorder, shape, world

MODELS = {"a": shape(), "b": shape(), "c": shape()}


def settings(*names: str, **changes: object) -> tuple[ServiceSettings, ...]:
    """Services as they were configured, with the same changes to each."""
    return tuple(replace(ServiceSettings(name=name, model=name), **changes) for name in names)


def reload(
    recorder: Recorder,
    *services: ServiceSettings,
    groups: tuple[GroupSettings, ...] = (),
    policy: PolicySettings | None = None,
) -> None:
    now = recorder.world.node.state.settings
    policy = policy or now.policy
    recorder.world.happen(ev.Reconfigured(services, groups, policy, now.replacement))


def names(recorder: Recorder) -> list[str]:
    return [service.name for service in recorder.world.node.status(recorder.world.now).services]


def run(recorder: Recorder, seconds: float) -> None:
    recorder.world.run(until=recorder.world.now + seconds)


def start(*loaded: str, absent: tuple[str, ...] = ()) -> Recorder:
    recorder = world(MODELS, preload=loaded, absent=absent)
    run(recorder, 2.0)
    return recorder


def test_the_same_file_changes_nothing() -> None:
    """No note, no message to anybody, and an operator's pin stays."""
    recorder = start("a")
    recorder.world.happen(ev.PinWanted(1, "b"))
    run(recorder, 1.0)
    before = list(recorder.notes)
    reload(recorder, *recorder.world.node.state.settings.services)
    recorder.world.run()
    assert recorder.notes == before
    assert recorder.world.node.state.services["b"].settings.pinned


def test_a_service_is_added() -> None:
    """It is examined and can be asked at once."""
    recorder = start("a", absent=("c",))
    reload(recorder, *recorder.world.node.state.settings.services, *settings("c", preload=True))
    run(recorder, 2.0)
    assert names(recorder) == ["a", "b", "c"]
    assert recorder.world.node.state.services["c"].replicas, "preload was not heeded"
    recorder.arrive(1, "c", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(1)


def test_a_removed_service_finishes_first() -> None:
    """Its requests end well, new ones are told that it is not there; then its memory is free."""
    recorder = start("a")
    recorder.arrive(1, "a", (1, 2), 30)
    run(recorder, 0.1)
    reload(recorder, *settings("b", "c"))
    recorder.arrive(2, "a", (1, 2), 3)
    assert (recorder.finished[2].status, recorder.finished[2].code) == (404, "model_not_found")
    recorder.world.happen(ev.LoadWanted(5, "a"))
    assert recorder.answers[5] == "no service is called 'a'"
    recorder.world.run()
    recorder.assert_output(1)
    assert names(recorder) == ["b", "c"]
    assert recorder.world.node.status(0).devices[0].weights_bytes == 0


def test_rules_change_in_place() -> None:
    """Nothing is loaded again for a limit; a new pin or preload brings it in."""
    recorder = start("a")
    reload(recorder, *settings("a", "b", "c", max_waiting=1, pinned=True))
    run(recorder, 2.0)
    services = recorder.world.node.state.services
    assert services["a"].swaps_in == 1
    assert all(service.replicas and service.settings.pinned for service in services.values())


def test_another_model_takes_the_name_over() -> None:
    """The old one ends its requests; meanwhile clients are told when to try again; no prefix survives."""
    recorder = start("a")
    prompt = tuple(range(20))
    recorder.arrive(1, "a", prompt, 30)
    run(recorder, 0.1)
    reload(recorder, *settings("a", model="other"), *settings("b", "c"))
    recorder.arrive(2, "a", prompt, 3)
    assert (recorder.finished[2].status, recorder.finished[2].code) == (503, "model_loading")
    assert recorder.finished[2].retry_after > 0
    recorder.world.run()
    recorder.assert_output(1)
    assert names(recorder) == ["a", "b", "c"]
    recorder.arrive(3, "a", prompt, 3)
    recorder.world.run()
    recorder.assert_output(3)
    assert recorder.cached[3] == 0, "KV of another model was taken for its own"


def test_a_change_of_mind_keeps_what_is_there() -> None:
    """Back in the file before its last request ended: it never left."""
    recorder = start("a")
    recorder.arrive(1, "a", (1, 2), 30)
    run(recorder, 0.1)
    before = recorder.world.node.state.settings.services
    reload(recorder, *settings("b"))
    reload(recorder, *before)
    recorder.arrive(2, "a", (1, 2), 3)
    recorder.world.run()
    recorder.assert_output(1)
    recorder.assert_output(2)
    assert recorder.world.node.state.services["a"].swaps_in == 1


def test_new_groups_part_those_who_share() -> None:
    """The one that came last leaves when its requests have ended."""
    recorder = start("a", "b")
    recorder.arrive(1, "b", (1, 2), 20)
    run(recorder, 0.05)
    apart = (GroupSettings(services=("a", "b"), share_members=False),)
    reload(recorder, *recorder.world.node.state.settings.services, groups=apart)
    recorder.world.run()
    recorder.assert_output(1)
    assert list(recorder.world.node.state.devices[0].replicas) == ["a"]


def test_the_policy_changes_at_once() -> None:
    """Between two steps; requests that run go on."""
    recorder = start("a")
    recorder.arrive(1, "a", (1, 2), 30)
    run(recorder, 0.05)
    services = recorder.world.node.state.settings.services
    for policy in ("adbs", "fcfs", "round-robin", "budget"):
        reload(recorder, *services, policy=PolicySettings(scheduler=policy))
        run(recorder, 0.02)
        assert recorder.world.node.status(0).policy == policy
    recorder.world.run()
    recorder.assert_output(1)

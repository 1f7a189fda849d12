"""A node that went through bytes goes on as if nothing had happened; and bytes are never code."""

from __future__ import annotations

import msgspec
import pytest

from seallmd.core import events as ev
from seallmd.core.snapshot import freeze, thaw
from tests.core.test_histories import PARALLEL, REPLAYABLE, SERVICES, History


@pytest.mark.parametrize(
    ("policy", "parallel"),  # dedicated devices are not shared by groups
    [("budget", False), ("budget", True), ("adbs", False), ("adbs", True), ("dedicated", False)],
)
def test_a_thawed_node_goes_on_alike(policy: str, parallel: bool) -> None:
    """In the middle of everything: steps on their way, copies, preempted requests, prefixes, plans."""
    history = History(
        4,
        (48, 44, 46) if parallel else (48, 44),
        PARALLEL if parallel else SERVICES,
        policy=policy,
        host_kv=20,
        tensor_parallel={"pair": 2, "trio": 3} if parallel else {},
    )
    for _ in range(300):
        history.act(history.random.choice(REPLAYABLE))
    copy = thaw(freeze(history.world.node))
    copy.check()
    seen: list[tuple[float, ev.Event, list[ev.Action]]] = []
    follow = history.recorder.observe

    def observe(event: ev.Event, actions: list[ev.Action]) -> None:
        seen.append((history.world.now, event, list(actions)))
        follow(event, actions)

    history.world._observe = observe
    for _ in range(300):
        history.act(history.random.choice(REPLAYABLE))
    history.finish()
    assert len(seen) > 300
    for now, event, actions in seen:
        assert copy.handle(event, now) == actions
    copy.check()


def test_nothing_of_others_is_ever_looked_up() -> None:
    """Neither written nor read: what is not of the core, nor what a module of it only imports."""
    with pytest.raises(TypeError, match="is not of"):
        freeze({"a": ModuleNotFoundError})
    for name in ("os:system", "seallmd.core.node:deepcopy", "seallmd.core.node:Node.__init__.__globals__"):
        with pytest.raises(ValueError, match="not"):
            thaw(msgspec.msgpack.encode([["call", name, ["x"]]]))
    for kind in ("call", "struct"):  # a function of the core, and a class whose constructor does things
        for name in ("seallmd.core.snapshot:thaw", "seallmd.core.node:Node"):
            with pytest.raises(ValueError, match="no class of this kind"):
                thaw(msgspec.msgpack.encode([[kind, name, []]]))


def _deep(levels: int) -> bytes:
    """Lists in lists."""
    entries = [["list", "", [msgspec.msgpack.Ext(1, bytes([n >> 8, n & 255]))]] for n in range(1, levels)]
    return msgspec.msgpack.encode(entries)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"[]", msgspec.msgpack.encode([["list", "", 3]]), _deep(20_000)]
)
def test_damaged_snapshots_are_refused(data: bytes) -> None:
    """With one kind of error."""
    with pytest.raises(ValueError, match="not a snapshot"):
        thaw(data)

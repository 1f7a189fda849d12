"""MuxServe's quotas, and its order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seallmd.core import events as ev
from seallmd.core.adbs import ADAPT_SECONDS, BUSY, KEPT, Adbs, adapted
from seallmd.core.messages import Sampling
from seallmd.core.service import Replica
from seallmd.core.state import Device, NodeState
from tests.core.helpers import BLOCK, Recorder, shape, world

SERVICES = ("a", "b", "c")
TOKEN_BYTES = 64


@given(
    pool=st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(st.floats(1.0, 1e9), st.floats(0.0, 1.2), st.booleans()),
        min_size=1,
    )
)
def test_quotas_move_from_those_who_have_to_those_who_lack(
    pool: dict[str, tuple[float, float, bool]],
) -> None:
    """Protects the pool: its sum stays, nobody gives what it uses, who is short never gets less."""
    quotas = {name: quota for name, (quota, _, _) in pool.items()}
    used = {name: int(quota * share) for name, (quota, share, _) in pool.items()}
    queued = [name for name, (_, _, queue) in pool.items() if queue]
    after = adapted(quotas, used, queued)
    assert sum(after.values()) == pytest.approx(sum(quotas.values()))
    least = KEPT * sum(quotas.values()) / len(quotas)
    for name, quota in quotas.items():
        short = name in queued and used[name] >= BUSY * quota
        if short:
            assert quota <= after[name] <= quota * 1.1 * (1 + 1e-9)
        else:
            assert after[name] <= quota
            assert after[name] >= min(quota, max(used[name], least)) * (1 - 1e-9)


@dataclass
class Scene:
    """Three services resident on one device, with the state that a policy looks at."""

    recorder: Recorder
    state: NodeState
    device: Device

    def wait(self, request: int, service: str, prompt: int = 8) -> None:
        """A request waits, and runs as far as the node lets it."""
        self.recorder.arrive(request, service, (request,) * prompt, 20)

    def ready(self) -> list[Replica]:
        return list(self.device.replicas.values())

    def order(self, adbs: Adbs) -> list[str]:
        return [replica.service for replica in adbs.order(self.state, self.device, self.ready())]


@pytest.fixture
def scene() -> Scene:
    recorder = world({name: shape(TOKEN_BYTES) for name in SERVICES}, (200,), preload=SERVICES)
    state = recorder.world.node.state
    return Scene(recorder, state, state.devices[0])


def kv_bytes(scene: Scene) -> int:
    arena = scene.device.arena
    assert arena is not None
    return (arena.capacity - arena.weights) * BLOCK


def test_quotas_begin_equal_and_cover_what_weights_leave(scene: Scene) -> None:
    """Protects the start: nobody is favoured, nothing is left out."""
    quotas = Adbs().quotas(scene.state, scene.device)
    assert set(quotas) == set(SERVICES)
    assert list(quotas.values()) == [pytest.approx(kv_bytes(scene) / 3)] * 3


def test_who_is_evicted_leaves_its_quota_to_the_others(scene: Scene) -> None:
    """Protects the sum when services come and go; those that stay keep their proportions."""
    adbs = Adbs()
    adbs.quotas(scene.state, scene.device)
    scene.recorder.world.happen(ev.EvictWanted(1, "b"))
    quotas = adbs.quotas(scene.state, scene.device)
    assert set(quotas) == {"a", "c"}
    assert sum(quotas.values()) == pytest.approx(kv_bytes(scene))


def test_a_service_grows_into_the_quota_of_idle_ones(scene: Scene) -> None:
    """Protects adaptation: not before a period is over, then by a tenth, from those who use nothing."""
    adbs = Adbs()
    for request in range(1, 80):
        scene.wait(request, "a", prompt=40)
    before = dict(adbs.quotas(scene.state, scene.device))
    full = int(before["a"] / TOKEN_BYTES)
    for request in scene.device.replicas["a"].running.values():
        request.scheduled = full
    scene.recorder.world.node._state.now += ADAPT_SECONDS / 2
    assert adbs.quotas(scene.state, scene.device) == before
    scene.recorder.world.node._state.now += ADAPT_SECONDS / 2
    after = adbs.quotas(scene.state, scene.device)
    assert after["a"] == pytest.approx(1.1 * before["a"])
    assert after["b"] == after["c"] == pytest.approx(0.95 * before["b"])


def test_admission_is_bound_by_the_quota(scene: Scene) -> None:
    """Protects the others' memory: within the quota yes, beyond it no, and the first one always."""
    adbs = Adbs()
    quota = adbs.quotas(scene.state, scene.device)["a"]
    for request in (1, 2):
        scene.wait(request, "a")
    replica = scene.device.replicas["a"]
    waiting = scene.recorder.world.node.state.requests[2]
    for request in replica.running.values():
        request.scheduled = 0
    assert adbs.admits(scene.state, scene.device, replica, waiting)
    next(iter(replica.running.values())).scheduled = int(quota / TOKEN_BYTES)
    assert not adbs.admits(scene.state, scene.device, replica, waiting)
    running, replica.running = replica.running, {}
    assert adbs.admits(scene.state, scene.device, replica, waiting)
    replica.running = running


def test_prompts_go_first_and_services_take_turns(scene: Scene) -> None:
    """Protects the order: who would only decode comes behind, the longest unserved of each kind first."""
    for request, name in enumerate(SERVICES, 1):
        scene.wait(request, name)
    scene.recorder.world.run(until=scene.recorder.world.now + 0.1)
    a, b, c = scene.ready()
    assert all(r.pending == 1 for replica in (a, b, c) for r in replica.running.values())
    a.used, b.used, c.used = 3.0, 1.0, 2.0
    assert scene.order(Adbs()) == ["b", "c", "a"]
    next(iter(a.running.values())).prompt += 30  # as if its prompt were not through yet
    assert scene.order(Adbs()) == ["a", "b", "c"]


def test_a_queue_beyond_its_quota_does_not_go_first(scene: Scene) -> None:
    """Protects the others from a service whose prompts may not be taken in."""
    adbs = Adbs()
    quota = adbs.quotas(scene.state, scene.device)["a"]
    for request, name in enumerate(SERVICES, 1):
        scene.wait(request, name)
    scene.recorder.world.run(until=scene.recorder.world.now + 0.1)
    a, b, c = scene.ready()
    a.used, b.used, c.used = 3.0, 1.0, 2.0
    state = scene.recorder.world.node._state
    late = state.requests[next(iter(a.running))]
    waiting = type(late)(
        id=99, service="a", order=99, arrived=0.0, tokens=[1] * 8, prompt=8, max_tokens=4,
        sampling=Sampling(), stop_ids=frozenset(), root=None, leader=0,
    )  # fmt: skip
    state.services["a"].waiting[99] = waiting
    assert scene.order(adbs) == ["a", "b", "c"]
    late.scheduled, late.drawn = int(quota / TOKEN_BYTES), int(quota / TOKEN_BYTES) - late.prompt + 1
    assert scene.order(adbs) == ["b", "c", "a"]

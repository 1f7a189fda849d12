"""Random histories with faults, memory always short: nothing is lost, owned twice, or wrong.

After every event `Node.check()` holds; the simulated devices verify that every KV slot and every block of
weights still holds what was written; every request ends exactly once; those that end well have exactly the
tokens that the model draws after their prompt; at the end nothing is held.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seallmd.core import events as ev
from seallmd.core.messages import ModelShape
from tests.core.helpers import Recorder, shape, world

SERVICES: dict[str, ModelShape | str] = {
    "a": shape(64),
    "b": shape(32, segments=(1024, 256, 512)),
    "c": shape(128, segments=(256, 2048)),
    "d": shape(64, segments=(768, 768)),
    "e": shape(32, segments=(4096,)),  # one long run: KV has to move out of its way
    "bad": "this model is refused",
}


# Groups of two and three devices that overlap with each other and with the services above.
PARALLEL: dict[str, ModelShape | str] = {
    "a": shape(64),
    "b": shape(32, segments=(1024, 256, 512)),
    "pair": shape(64, ranks=(2,)),
    "large": shape(64, segments=(8192, 6144), layers=2, ranks=(2, 4)),  # one device cannot hold it
    "trio": shape(96, segments=(1536, 768), ranks=(3,)),
}


class History:
    """A world and the random things that are done to it."""

    def __init__(
        self,
        seed: int,
        arenas: tuple[int, ...] = (48, 44),
        services: dict[str, ModelShape | str] = SERVICES,
        **options: object,
    ) -> None:
        self.random = random.Random(seed)
        self.services = list(services)
        self.recorder = world(
            services,
            arenas,
            min_residency_seconds=0.1,
            patience_seconds=0.5,
            **options,  # type: ignore[arg-type]
        )
        self.world = self.recorder.world
        self.count = 0
        self.tickets = 0

    def arrive(self) -> None:
        """One request, or n choices of one prompt; prompts often share a beginning."""
        draw = self.random
        service = draw.choice(self.services)
        length = draw.randint(1, 40)
        prompt = tuple(range(length)) if draw.random() < 0.5 else tuple(draw.choices(range(50), k=length))
        leader = 0
        for _ in range(draw.choice((1, 1, 1, 3))):
            self.count += 1
            self.recorder.arrive(
                self.count,
                service,
                prompt,
                draw.randint(1, 30),
                stop_ids=(draw.randrange(50),) if draw.random() < 0.3 else (),
                salt=draw.choice(("", "", "other")),
                leader=leader,
            )
            leader = leader or self.count

    def cancel(self) -> None:
        """Any request, also one that is over."""
        if self.count:
            self.world.happen(ev.Cancelled(self.random.randint(1, self.count)))

    def load(self) -> None:
        self.tickets += 1
        self.world.happen(ev.LoadWanted(self.tickets, self.random.choice([*self.services, "nobody"])))

    def evict(self) -> None:
        self.tickets += 1
        now = self.random.random() < 0.5
        self.world.happen(ev.EvictWanted(self.tickets, self.random.choice([*self.services, "nobody"]), now))

    def kill_worker(self) -> None:
        self.random.choice(self.world.devices).kill(restart_after=self.random.random() * 3)

    def kill_host(self) -> None:
        self.world.host.kill(restart_after=self.random.random() * 3)

    def fail_step(self) -> None:
        self.random.choice(self.world.devices).fail_steps += 1

    def fail_copy(self) -> None:
        self.random.choice(self.world.devices).fail_copies += 1

    def fail_image(self) -> None:
        self.world.host.fail_images += 1

    def poison(self) -> None:
        """The next request to come ends every worker that runs it."""
        for device in self.world.devices:
            device.poison.add(self.count + 1)

    def wait(self) -> None:
        """Some virtual time."""
        self.world.run(until=self.world.now + self.random.choice((0.001, 0.02, 0.3, 2.0)))

    def act(self, name: str) -> None:
        getattr(self, name)()

    def finish(self) -> None:
        """Let all end, then see that all ended, once, well, and that nothing is left behind."""
        for device in self.world.devices:
            device.fail_steps = device.fail_copies = 0
            device.poison -= set(range(self.count + 1, self.count + 3))
        self.world.host.fail_images = 0
        self.world.run()
        recorder = self.recorder
        assert set(recorder.finished) == set(recorder.prompts), "a request never ended"
        assert set(recorder.answers) == set(range(1, self.tickets + 1)), "a command was never answered"
        for request, finish in recorder.finished.items():
            if finish.reason in ("stop", "length"):
                recorder.assert_output(request)
                assert not any(request in device.poison for device in self.world.devices), "it ran"
        status = self.world.node.status(self.world.now)
        assert all(device.kv_bytes == 0 for device in status.devices), "blocks are held by nobody"
        assert not self.world.node.state.requests


ACTIONS = (
    ["arrive"] * 30
    + ["wait"] * 24
    + ["cancel"] * 3
    + ["load", "evict", "kill_worker", "kill_host", "fail_step", "fail_copy", "fail_image", "poison"]
)


@pytest.mark.parametrize("policy", ["budget", "round-robin", "fcfs", "adbs", "dedicated"])
@pytest.mark.parametrize("seed", range(6))
def test_long_history_with_faults(seed: int, policy: str) -> None:
    """Thousands of events with every kind of fault."""
    history = History(
        seed, policy=policy, pipeline_depth=1 + seed % 3, step_tokens=8 + 8 * seed, host_kv=seed * 6
    )
    for _ in range(1500):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    assert len(history.world.history) > 2000
    saves = sum(service.saves for service in history.world.node.status(0).services)
    assert seed == 0 or policy == "dedicated" or saves > 0, "no KV went to host memory"


@pytest.mark.parametrize("seed", range(6))
def test_overlapping_groups_with_faults(seed: int) -> None:
    """Tensor-parallel replicas share devices with each other and with others: nothing deadlocks or leaks."""
    wanted = {"pair": 2, "trio": 3}
    history = History(
        seed,
        (48, 44, 46),
        PARALLEL,
        tensor_parallel=wanted,
        pipeline_depth=1 + seed % 2,
        step_tokens=16,
        host_kv=20,
    )
    for _ in range(1200):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    swaps = {service.name: service.swaps_in for service in history.world.node.status(0).services}
    assert all(swaps[name] > 0 for name in PARALLEL), swaps


@pytest.mark.parametrize("seed", range(3))
def test_split_layout_with_faults(seed: int) -> None:
    """Runs of several blocks, one per layer: prefixes are shared whole, tables stay whole."""
    services: dict[str, ModelShape | str] = {
        "a": shape(64, layers=2),
        "b": shape(96, segments=(1024, 256, 512), layers=3),
        "c": shape(32),
    }
    history = History(seed, (48, 44), services, kv_layout="split", step_tokens=16, host_kv=30)
    for _ in range(1000):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    assert any(history.recorder.cached.values()), "no prefix was reused"


@pytest.mark.parametrize("seed", range(8))
def test_without_faults_everything_succeeds(seed: int) -> None:
    """Memory is short, models swap, requests are preempted; yet no request that can be served fails."""
    history = History(seed, arenas=(42, 44)[: 1 + seed % 2], replicate_seconds=0.05)
    for _ in range(300):
        history.act(history.random.choice(["arrive", "wait", "wait"]))
    history.finish()
    failed = {f.error for f in history.recorder.finished.values() if f.reason == "failed"}
    assert all("context is" in error or "refused" in error for error in failed), failed
    assert any("preempted" in note for note in history.recorder.notes), "memory was never short"
    assert sum(s.swaps_in for s in history.world.node.status(0).services) > 4, "nothing was swapped"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.lists(st.sampled_from(sorted(set(ACTIONS))), max_size=60))
def test_any_short_history(seed: int, actions: list[str]) -> None:
    """Short histories of any composition; hypothesis shrinks what it finds."""
    history = History(seed)
    for name in actions:
        history.act(name)
    history.finish()


def test_same_history_gives_same_actions() -> None:
    """The node is deterministic: what the journal relies on."""

    def run() -> tuple[Recorder, list[list[ev.Action]]]:
        history = History(5)
        seen: list[list[ev.Action]] = []
        follow = history.recorder.observe

        def observe(event: ev.Event, actions: list[ev.Action]) -> None:
            seen.append(list(actions))
            follow(event, actions)

        history.world._observe = observe
        for _ in range(150):
            history.act(history.random.choice(ACTIONS))
        history.finish()
        return history.recorder, seen

    first, actions = run()
    second, again = run()
    assert actions == again
    assert first.outputs == second.outputs

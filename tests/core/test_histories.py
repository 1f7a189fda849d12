"""Random histories with faults, memory always short: nothing is lost, owned twice, or wrong.

After every event `Node.check()` holds; the simulated devices verify that every KV slot and every block of
weights still holds what was written; every request ends exactly once; those that end well have exactly the
tokens that the model draws after their prompt; at the end nothing is held.

`HISTORIES=500 pytest tests/core/test_histories.py` runs so many seeds of each kind instead of a few.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core.placement import place
from seallmd.core.plan import Demand, Machine, Plan
from seallmd.core.settings import GroupSettings, ReplacementSettings
from seallmd.core.shapes import ModelShape
from seallmd.core.tiers import Tier
from seallmd.core.transition import Bring, Change, Drop
from seallmd.sim.timing import Costs
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


def seeds(count: int) -> range:
    """So many, or as many as the environment asks for."""
    return range(int(os.environ.get("HISTORIES", count)))


def stay(_demands: Sequence[Demand], _machine: Machine, near: Plan) -> Plan:
    """Finds the plan in force, at no cost: most histories get their moves from `History.move` instead."""
    return near


EAGER = ReplacementSettings(min_interval_seconds=2.0, max_interval_seconds=8.0, drift=1.5)


class History:
    """A world and the random things that are done to it.

    search: for plans; the real one takes most of the time of a history. early: weights serve before they have
    been copied, as on CPUs.
    """

    def __init__(
        self,
        seed: int,
        arenas: tuple[int, ...] = (48, 44),
        services: dict[str, ModelShape | str] = SERVICES,
        search: Callable[[Sequence[Demand], Machine, Plan], Plan] = stay,
        early: bool = False,
        **options: object,
    ) -> None:
        self.random = random.Random(seed)
        self.services = list(services)
        self.recorder = world(
            services,
            arenas,
            min_residency_swaps=2.0,
            patience_seconds=0.5,
            costs=Costs(early=early),
            **options,  # type: ignore[arg-type]
        )
        self.world = self.recorder.world
        self.world.search = search
        self.first = {service.name: service for service in self.world.node.state.settings.services}
        self.count = 0
        self.tickets = 0

    def arrive(self) -> None:
        """One request, or n choices of one prompt; prompts often share a beginning."""
        draw = self.random
        service = draw.choice(self.services)
        length = draw.randint(1, 40)
        prompt = tuple(range(length)) if draw.random() < 0.5 else tuple(draw.choices(range(50), k=length))
        if draw.random() < 0.15:
            self.count += 1
            pooling = draw.choice(("mean", "mean", "last"))
            self.recorder.arrive(self.count, service, prompt, 0, pooling=pooling)
            return
        leader = 0
        tier: Tier = draw.choice(("default", "default", "priority", "flex", "batch"))
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
                scores=self.count % 4 == 0,
                tier=tier,
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

    def _ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def pin(self) -> None:
        name = self.random.choice([*self.services, "nobody"])
        self.world.happen(ev.PinWanted(self._ticket(), name, self.random.random() < 0.4))

    def drain(self) -> None:
        """A service, a device or everything, or taken back."""
        on = self.random.random() < 0.4
        match self.random.randrange(3):
            case 0:
                name = self.random.choice([*self.services, "nobody"])
                self.world.happen(ev.ServiceDrainWanted(self._ticket(), name, on))
            case 1:
                index = self.random.randint(0, len(self.world.devices))
                self.world.happen(ev.DeviceDrainWanted(self._ticket(), index, on))
            case _:
                self.world.happen(ev.NodeDrainWanted(self._ticket(), on and self.random.random() < 0.3))

    def keep(self) -> None:
        seconds = self.random.choice((0.0, 1e-300, 0.05, 1.0))
        self.world.happen(ev.KeepWanted(self.random.choice([*self.services, "nobody"]), seconds))

    def reconfigure(self) -> None:
        """Services leave, come, become other models; rules change."""
        draw, settings = self.random, self.world.node.state.settings
        names = [name for name in self.services if draw.random() < 0.9]
        old = {service.name: service for service in settings.services}
        services = [replace(self.first[name], **draw.choice(CHANGES)) for name in names]
        services = [old.get(s.name, s) if draw.random() < 0.5 else s for s in services]
        group = GroupSettings(
            services=tuple(draw.sample(self.services, 2)),
            share_members=draw.random() < 0.5,
            share_others=draw.random() < 0.7,
        )
        groups = (group,) if draw.random() < 0.6 else ()
        self.world.happen(ev.Reconfigured(tuple(services), groups, settings.policy, settings.replacement))

    def undrain_all(self) -> None:
        self.world.happen(ev.NodeDrainWanted(self._ticket(), drained=False))
        for index in range(len(self.world.devices)):
            self.world.happen(ev.DeviceDrainWanted(self._ticket(), index, drained=False))
        for name in self.services:
            self.world.happen(ev.ServiceDrainWanted(self._ticket(), name, drained=False))

    def kill_worker(self) -> None:
        self.random.choice(self.world.devices).kill(restart_after=self.random.random() * 3)

    def kill_host(self) -> None:
        self.world.host.kill(restart_after=self.random.random() * 3)

    def fail_step(self) -> None:
        self.random.choice(self.world.devices).fail_steps += 1

    def lack_memory(self) -> None:
        """From here on it is for lack of memory that a device's steps fail, or it is not any more."""
        device = self.random.choice(self.world.devices)
        device.lacks_memory = not device.lacks_memory
        device.fail_steps += 1

    def stop_worker(self) -> None:
        """Its steps and copies stand still; if for long, it is killed for it."""
        device, seconds = self.random.choice(self.world.devices), self.random.choice((0.1, 1.0, 5.0))
        device.stands_until = self.world.now + seconds
        if seconds > 3 and device.alive:
            generation = device.generation
            self.world.after(3.0, lambda: device.kill(0.5) if device.generation == generation else None)

    def jump_clock(self) -> None:
        """The daemon stood still, and all that came meanwhile comes now."""
        self.world.stand_still(self.random.choice((0.5, 60.0, 86400.0)))

    def fail_copy(self) -> None:
        self.random.choice(self.world.devices).fail_copies += 1

    def fail_image(self) -> None:
        self.world.host.fail_images += 1

    def move(self) -> None:
        """Steps of a plan, whatever it is good for: also such as cannot be made, and turn out so half way."""
        planner = self.world.node._planner
        known = [service.name for service in planner._plannable()]
        if not planner.enabled or planner._steps or not known:
            return
        names = self.random.choices(known, k=self.random.randint(1, 3))
        planner._replacement = planner._replacement or planner._begin()
        planner._holds = lambda: self.random.random() < 0.9  # type: ignore[method-assign]
        planner._steps = deque(self._change(name) for name in names)
        planner._begin_step()
        self.world.happen(ev.Tick())

    def _change(self, name: str) -> Change:
        """Bring or drop a replica of a service."""
        draw, node = self.random, self.world.node
        service = node.state.services[name]
        if service.replicas and draw.random() < 0.5:
            return Drop(name, draw.choice(service.replicas).devices)
        devices = len(self.world.devices)
        ranks = draw.choice([n for n in node._planner._feasible_ranks(service) if n <= devices])
        first = draw.randrange(devices - ranks + 1)
        return Bring(name, tuple(range(first, first + ranks)))

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
        self.undrain_all()
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
    + ["move"] * 3
)

# A move is done to the planner behind the node's back, and so is not in its list of events.
REPLAYABLE = [action for action in ACTIONS if action != "move"]


OPERATIONS = ["pin", "drain", "keep", "reconfigure"]

# What `torture` does beside; the histories here have their figures without it.
HARDSHIPS = ["lack_memory", "stop_worker", "jump_clock"]

# What a new configuration may say of a service: other rules, or another model under its name.
CHANGES: tuple[dict[str, object], ...] = (
    {},
    {"idle_seconds": 0.1},
    {"pinned": True},
    {"preload": True, "max_waiting": 3},
    {"model": "another"},
    {"devices": ((0,),)},
)


@pytest.mark.parametrize("policy", ["budget", "round-robin", "fcfs", "adbs", "dedicated"])
@pytest.mark.parametrize("seed", seeds(3))
def test_long_history_with_faults(seed: int, policy: str) -> None:
    """Thousands of events with every kind of fault."""
    history = History(
        seed,
        policy=policy,
        early=seed % 2 == 1,
        pipeline_depth=1 + seed % 3,
        step_tokens=8 + 8 * (seed % 6),
        host_kv=seed % 6 * 6,
    )
    for _ in range(1000):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    assert len(history.world.history) > 1000
    saves = sum(service.saves for service in history.world.node.status(0).services)
    assert seed % 6 == 0 or policy == "dedicated" or saves > 0, "no KV went to host memory"


@pytest.mark.parametrize("seed", seeds(4))
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
    for _ in range(1000):
        history.act(history.random.choice(ACTIONS))
    history.finish()
    swaps = {service.name: service.swaps_in for service in history.world.node.status(0).services}
    assert all(swaps[name] > 0 for name in PARALLEL), swaps


@pytest.mark.parametrize("seed", seeds(3))
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


@pytest.mark.parametrize("seed", seeds(4))
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


@pytest.mark.parametrize("seed", seeds(1))
def test_history_with_the_real_search(seed: int) -> None:
    """Plans that the search finds are looked for, moved to and given up while everything else goes on."""
    history = History(seed, (60, 56), search=place, replacement=EAGER, host_kv=12)
    for _ in range(400):
        history.act(history.random.choice(REPLAYABLE))
    history.finish()
    found = sum(isinstance(event, ev.PlanFound) for _, event in history.world.history)
    assert found > 5


@pytest.mark.parametrize("seed", seeds(4))
def test_operators_at_work(seed: int) -> None:
    """Pins, drains, idle limits, groups and reloads among requests and faults: nothing is lost or stays."""
    history = History(
        seed,
        arenas=(48, 44, 46)[: 1 + seed % 3],
        early=seed % 2 == 0,
        pipeline_depth=1 + seed % 2,
        host_kv=seed * 4,
    )
    for _ in range(1000):
        history.act(history.random.choice(ACTIONS + OPERATIONS * 2))
    history.finish()
    notes = set(history.recorder.notes)
    assert {"gone", "added to the configuration", "configured anew"} <= notes
    assert any(note.endswith("it has left the configuration") for note in notes)
    assert any("idle for" in note for note in notes)
    good = [f for f in history.recorder.finished.values() if f.reason in ("stop", "length")]
    assert len(good) > 0.1 * len(history.recorder.finished)


@pytest.mark.parametrize("seed", seeds(2))
def test_operators_at_work_on_groups_of_devices(seed: int) -> None:
    """The same where replicas span devices: one that is drained takes whole groups with it."""
    history = History(
        seed, (48, 44, 46), PARALLEL, tensor_parallel={"pair": 2, "trio": 3}, step_tokens=16, host_kv=20
    )
    for _ in range(900):
        history.act(history.random.choice(ACTIONS + OPERATIONS * 2))
    history.finish()
    assert {"gone", "configured anew"} <= set(history.recorder.notes)


@settings(
    max_examples=int(os.environ.get("HISTORIES", 60)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 2**32),
    actions=st.lists(st.sampled_from(sorted({*ACTIONS, *OPERATIONS})), max_size=60),
    policy=st.sampled_from(("budget", "round-robin", "fcfs", "adbs", "dedicated")),
    parallel=st.booleans(),
    split=st.booleans(),
    host_kv=st.sampled_from((0, 3, 30)),
)
def test_any_short_history(
    seed: int, actions: list[str], policy: str, parallel: bool, split: bool, host_kv: int
) -> None:
    """Short histories of any composition; hypothesis shrinks what it finds."""
    options: dict[str, object] = {"policy": policy, "host_kv": host_kv}
    if split:
        options["kv_layout"] = "split"
    if parallel:
        options["tensor_parallel"] = {"pair": 2, "trio": 3}
        history = History(seed, (48, 44, 46), PARALLEL, **options)
    else:
        history = History(seed, **options)
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
            history.act(history.random.choice(ACTIONS + OPERATIONS))
        history.finish()
        return history.recorder, seen

    first, actions = run()
    second, again = run()
    assert actions == again
    assert first.outputs == second.outputs


@pytest.mark.parametrize("kind", ["plain", "parallel", "planned"])
@pytest.mark.parametrize("seed", seeds(2))
def test_what_calm_leaves_out_would_have_changed_nothing(seed: int, kind: str) -> None:
    """A node that settles after every event does the same as one that does not while it is calm."""
    options: dict[str, object] = {"host_kv": 6, "replicate_seconds": 0.2, "pipeline_depth": 1 + seed}
    if kind == "parallel":
        options["tensor_parallel"] = {"pair": 2, "trio": 3}
        history = History(seed, (48, 44, 46), PARALLEL, **options)
    elif kind == "planned":
        history = History(seed, (60, 56), search=place, replacement=EAGER, **options)
    else:
        history = History(seed, (60, 56), **options)
    restless = deepcopy(history.world.node)
    restless._is_calm = lambda _moves: False  # type: ignore[method-assign]
    follow, calm, node = history.recorder.observe, 0, history.world.node

    def observe(event: ev.Event, actions: list[ev.Action]) -> None:
        nonlocal calm
        assert restless.handle(event, history.world.now) == actions
        calm += type(event) is ev.FromDevice and node._is_calm(node.state.moves)
        follow(event, actions)

    history.world._observe = observe
    for _ in range(400):
        history.act(history.random.choice(REPLAYABLE + OPERATIONS))
    history.finish()
    assert calm, "the node was never calm"

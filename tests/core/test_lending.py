"""Threads that idle CPU devices lend: to whom, and that neither tokens nor what is learnt change by it."""

from __future__ import annotations

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.lending import speedup
from seallmd.core.settings import NodeSettings, ServiceSettings
from seallmd.sim.timing import Costs
from seallmd.sim.world import World
from tests.core.helpers import BLOCK, Recorder, shape


def machine(devices: int, threads: int) -> tuple[Recorder, list[int]]:
    """A world of services "0", "1", ... with a device each, and the threads of all steps so far."""
    names = [str(number) for number in range(devices)]
    settings = NodeSettings(
        services=tuple(ServiceSettings(name=name, model=name, devices=((int(name),),)) for name in names),
        devices=devices,
        block_bytes=BLOCK,
        host_bytes=1 << 30,
        threads=threads,
    )
    recorder, seen = Recorder(), list[int]()

    def observe(event: ev.Event, actions: list[ev.Action]) -> None:
        seen.extend(
            a.message.threads
            for a in actions
            if isinstance(a, ev.ToDevice) and isinstance(a.message, msg.Step)
        )
        recorder.observe(event, actions)

    recorder.world = World(
        settings, dict.fromkeys(names, shape()), (40 * BLOCK,) * devices, Costs(), observe=observe
    )
    recorder.world.start()
    recorder.world.run(until=10.0)
    return recorder, seen


def test_alone() -> None:
    """Who is alone has all cores; every step, once its own copy is done."""
    recorder, seen = machine(2, 3)
    recorder.arrive(1, "0", (1, 2), 20)
    recorder.world.run()
    recorder.assert_output(1)
    assert set(seen) == {6}


def test_everybody() -> None:
    """While all compute, nobody lends; at the end one is alone."""
    recorder, seen = machine(2, 3)
    for request in range(2):
        recorder.arrive(request + 1, str(request), (1, 2), 30)
    recorder.world.run()
    for request in range(2):
        recorder.assert_output(request + 1)
    assert set(seen[2:-4]) == {0}


def test_some() -> None:
    """Two of four: each gets the threads of one more; three of four: nothing that is left over is whole."""
    recorder, seen = machine(4, 2)
    for request in range(3):
        recorder.arrive(request + 1, str(request), (1, 2), 30 - 10 * (request == 2))
    recorder.world.run()
    assert set(seen) >= {0, 4}


def test_what_is_learnt() -> None:
    """A service that was always alone is known as one that never was lent anything: decodes and prompts."""
    learnt = []
    for threads in (0, 4):
        recorder, _ = machine(2, threads)
        for request in range(1, 60):
            recorder.arrive(request, "0", tuple(range(request % 30, request % 30 + 12)), 20)
            if request % 5 in (1, 4):  # steps of one row and of several
                recorder.world.run()
        costs = recorder.world.node.profiles()["0"].costs
        learnt.append((costs.predict(1, 10), costs.predict(12, 12, 1)))
    for apart, lent in zip(*learnt, strict=True):
        assert abs(apart - lent) < 0.05 * apart


def test_prompts_gain_more_than_decodes() -> None:
    """Protects what is learnt and predicted: two threads do little for what waits for memory."""
    assert 1.0 < speedup(2, 1, 0.011, 0.01) < 1.3 < 1.7 < speedup(2, 1, 0.3, 0.01) < 2
    assert speedup(1, 1, 0.3, 0.01) == speedup(0, 1, 0.3, 0.01) == 1.0

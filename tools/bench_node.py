"""The cost of deciding: how long `Node.handle` takes, without workers, sockets or models.

    python -m tools.bench_node [--services N] [--requests N] [--policy NAME]

One device holds N services with the given number of requests; every step is answered at once. Prints the
median and tail of `handle` over all StepDone events, in processor time, also for fewer and more requests, so
that growth shows. Then what the flight recorder costs: an event, and a checkpoint while all of it is held and
after it.
"""

from __future__ import annotations

import argparse
import random
import time

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.node import Node
from seallmd.core.settings import NodeSettings, PolicySettings, ServiceSettings
from seallmd.core.shapes import LayerShape, ModelShape
from seallmd.core.snapshot import freeze
from seallmd.runtime.journal import FlightRecorder

BLOCK = 1 << 16
LAYER = LayerShape(kv_heads=2, k_dim=64, v_dim=64)
SHAPE = ModelShape("bench", "bfloat16", 2, (LAYER,) * 8, (BLOCK * 4,) * 8, 1000, 4096)


class Bench:
    """A node whose only device answers at once. seconds: of every `handle` of a StepDone."""

    def __init__(self, services: int, policy: str) -> None:
        names = [f"service-{i}" for i in range(services)]
        settings = NodeSettings(
            services=tuple(
                ServiceSettings(name=name, model=name, preload=True, max_waiting=1 << 20) for name in names
            ),
            devices=1,
            block_bytes=BLOCK,
            host_bytes=1 << 40,
            policy=PolicySettings(scheduler=policy, pipeline_depth=2),  # type: ignore[arg-type]
        )
        self.names = names
        self.node = Node(settings)
        self.seconds: list[float] = []
        self.now = 0.0
        self.events: list[tuple[ev.Event, list[ev.Action]]] = []
        self._steps: list[msg.Step] = []
        self.happen(ev.HostUp())
        self.happen(ev.WorkerUp(0, "bench", BLOCK * 200_000))
        for name in names:
            self.happen(ev.FromHostProcess(msg.Probed(name, "/", SHAPE)))
            self.happen(ev.FromHostProcess(msg.ImageReady(name, "/", 0, 0.0)))

    def happen(self, event: ev.Event) -> None:
        """One event, and what the device says to the actions."""
        before = time.process_time()
        actions = self.node.handle(event, self.now)
        if isinstance(event, ev.FromDevice):
            self.seconds.append(time.process_time() - before)
            self.events.append((event, list(actions)))
        for action in actions:
            if isinstance(action, ev.ToDevice):
                if isinstance(action.message, msg.CopyIn):
                    done = msg.CopyDone(action.message.service, 0.1, action.message.copy)
                    self.happen(ev.FromDevice(0, done))
                elif isinstance(action.message, msg.Step):
                    self._steps.append(action.message)

    def fill(self, requests: int, rng: random.Random) -> None:
        """Requests of all services, long enough to outlast the measurement."""
        for request in range(1, requests + 1):
            prompt = tuple(rng.choices(range(1000), k=rng.randint(10, 400)))
            service = self.names[request % len(self.names)]
            self.happen(ev.Arrived(request, service, prompt, 3000, msg.Sampling()))

    def run(self, steps: int) -> None:
        """Answer steps in order."""
        self.seconds.clear()
        self.events.clear()
        for _ in range(steps):
            step = self._steps.pop(0)
            self.now += 0.02
            tokens = tuple(1 for row in step.rows if row.sample)
            self.happen(ev.FromDevice(0, msg.StepDone(step.step, tokens, 0.02)))


def print_flight(bench: Bench, requests: int) -> None:
    """What recording in flight costs, for the events of the last run."""
    recorder = FlightRecorder(bench.node, 1 << 40)
    began = time.process_time()
    for event, actions in bench.events:
        recorder.record(bench.now, event, actions)
    each = (time.process_time() - began) / len(bench.events)
    print(f"flight recorder: {each * 1e6:.0f} us an event")
    print_checkpoint(bench, "all requests running or waiting")
    for request in range(1, requests + 1):
        bench.node.handle(ev.Cancelled(request), bench.now)
    print_checkpoint(bench, "no request left")


def print_checkpoint(bench: Bench, when: str) -> None:
    """How long the event loop stands still for one."""
    began = time.process_time()
    frozen = freeze(bench.node)
    seconds = time.process_time() - began
    arena = bench.node.state.devices[0].arena
    assert arena is not None
    blocks = f"{arena.kv} blocks of KV, {arena.cached} cached"
    print(f"checkpoint, {when} ({blocks}): {seconds * 1e3:.0f} ms, {len(frozen) / 1e6:.1f} MB")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="How long Node.handle takes.")
    parser.add_argument("--services", type=int, default=40)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--policy", default="budget")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    for requests in (options.requests * times // 4 for times in (1, 2, 4, 8, 16)):
        bench = Bench(options.services, options.policy)
        bench.fill(requests, random.Random(0))
        bench.run(options.steps)
        bench.node.check()
        times = sorted(bench.seconds)
        median, tail = times[len(times) // 2], times[len(times) * 99 // 100]
        print(
            f"{options.services} services, {requests:5d} requests, {options.policy}: "
            f"median {median * 1e3:.3f} ms, P99 {tail * 1e3:.3f} ms"
        )
    print_flight(bench, 2 * options.requests)


if __name__ == "__main__":
    main()

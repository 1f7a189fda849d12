"""A million events for the node in virtual time, with every kind of fault; a failure is shrunk to its cause.

    python -m tests.core.torture --events 1000000 --seed 0
    python -m tests.core.torture --play FILE          # a history that was found before

Owns the making of long random histories of many shapes, their running, and the search for a shorter history
that fails alike (delta debugging: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input,
2002). What a history does and how it is judged is `test_histories`'. Each action draws from a seed of its
own, so that taking one away leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tests.core.test_histories import ACTIONS, HARDSHIPS, OPERATIONS, PARALLEL, SERVICES, History

ACTIONS_PER_HISTORY = 1500
CHECKED_THROUGHOUT = (
    8  # every so manieth history is checked after every event, which takes three times as long
)
SHRINK_SECONDS = 300.0

Action = tuple[str, int]  # what is done, and the seed of its draws


class Case(NamedTuple):
    """A history that can be run again. options: of `world`; parallel: tensor-parallel groups among them."""

    parallel: bool
    options: dict[str, object]
    actions: tuple[Action, ...]

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(self._asdict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """From a file."""
        fields = json.loads(text)
        return cls(
            fields["parallel"], fields["options"], tuple((name, seed) for name, seed in fields["actions"])
        )


def make(seed: int, actions: int = ACTIONS_PER_HISTORY) -> Case:
    """The history of a seed: policies, depths, layouts and sizes vary with it."""
    draw = random.Random(seed)
    parallel = draw.random() < 0.3
    options: dict[str, object] = {
        "policy": draw.choice(("budget", "budget", "round-robin", "fcfs", "adbs", "dedicated")),
        "pipeline_depth": draw.randint(1, 3),
        "step_tokens": draw.choice((1, 8, 16, 48)),
        "host_kv": draw.choice((0, 8, 30)),
        "kv_layout": draw.choice(("merged", "merged", "split")),
        "prefix_reuse": draw.random() < 0.8,
        "replicate_seconds": draw.choice((0.05, 1.0)),
        "early": draw.random() < 0.3,
    }
    kinds = ACTIONS + HARDSHIPS + OPERATIONS * (draw.random() < 0.4)
    return Case(parallel, options, tuple((draw.choice(kinds), draw.getrandbits(32)) for _ in range(actions)))


def play(case: Case, *, check_every_event: bool = False) -> int:
    """Run a history to its end; returns how many events it had. Raises what is wrong.

    The node is checked after every action, or after every event.
    """
    options = dict(case.options)
    if case.parallel:
        options["tensor_parallel"] = {"pair": 2, "trio": 3}
    history = History(
        0,
        (48, 44, 46) if case.parallel else (48, 44),
        PARALLEL if case.parallel else SERVICES,
        check_every_event=check_every_event,
        **options,
    )
    for name, seed in case.actions:
        history.random = random.Random(seed)
        history.act(name)
        history.world.node.check()
    history.finish()
    return len(history.world.history)


def failure(case: Case) -> str:
    """What goes wrong in a history: the error's kind and place, empty when nothing does."""
    try:
        play(case, check_every_event=True)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what is looked for
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        line = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        return f"{type(error).__name__} at {line}"
    return ""


def shrink(
    actions: Sequence[Action], fails: Callable[[Sequence[Action]], bool], until: float
) -> Sequence[Action]:
    """The fewest actions that still fail, as far as is found by `until` (time.monotonic); ddmin."""
    parts = 2
    while len(actions) >= 2 and time.monotonic() < until:
        size = -(-len(actions) // parts)
        for start in range(0, len(actions), size):
            rest = [*actions[:start], *actions[start + size :]]
            if rest and fails(rest):
                actions, parts = rest, max(2, parts - 1)
                break
            if time.monotonic() > until:
                return actions
        else:
            if size == 1:
                return actions
            parts = min(len(actions), 2 * parts)
    return actions


def _run(seed: int) -> tuple[int, int, str]:
    """(seed, events, what went wrong)"""
    try:
        return seed, play(make(seed), check_every_event=seed % CHECKED_THROUGHOUT == 0), ""
    except Exception as error:  # noqa: BLE001 - as above
        return seed, 0, f"{type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 1 when a history fails, which is then shrunk and written to a file."""
    parser = argparse.ArgumentParser(description="Random histories for the node, in virtual time.")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first history; the next ones follow")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--play", type=Path, help="run this one history, checking after every event")
    parser.add_argument("--out", type=Path, default=Path("failing-history.json"))
    options = parser.parse_args(arguments)
    if options.play:
        print(
            f"{play(Case.from_json(options.play.read_text()), check_every_event=True)} events, nothing wrong"
        )
        return 0
    began, events, histories = time.monotonic(), 0, 0
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        while events < options.events:
            first = options.seed + histories
            for seed, count, wrong in pool.map(_run, range(first, first + 8 * options.processes)):
                histories, events = histories + 1, events + count
                if wrong:
                    print(f"history {seed}: {wrong}", file=sys.stderr)
                    _write_shrunk(make(seed), options.out)
                    return 1
    seconds = time.monotonic() - began
    taken = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = taken.ru_utime + taken.ru_stime
    print(f"{events} events in {histories} histories, nothing wrong, {seconds:.0f} s ({cpu:.0f} s of CPU)")
    return 0


def _write_shrunk(case: Case, out: Path) -> None:
    """Write the shortest history found that fails in the same place."""
    same = failure(case)
    until = time.monotonic() + SHRINK_SECONDS
    shorter = shrink(
        case.actions, lambda actions: failure(case._replace(actions=tuple(actions))) == same, until
    )
    out.write_text(case._replace(actions=tuple(shorter)).to_json() + "\n")
    print(f"{same}: {len(case.actions)} actions shrunk to {len(shorter)}, in {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""How much slower steps are while another device of the machine runs one too, from a recorded run.

    python -m tools.bench_rivals --journal ... --system "seallmd budget" --out bench
    python -m tools.bench_contention bench/seallmd-budget-2 [RUN ...]

RUN is a path without its ending: the journal (.journal) and what was learnt (.profiles) are read. What was
learnt cancels out: it only weighs steps of different sizes. Steps that ran alone are compared with those
beside which another device was busy for nearly all of the time, by service, prompts apart. The last line is
`contention` of a device's roofline (`seallmd.core.cost`). Journals can only be read by the version of seallmd
that wrote them.

Exit code 0; 2 when a file cannot be read, or belongs to another version.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.runtime.journal import checksum, read
from seallmd.sim.comparison import read_profiles
from seallmd.sim.models import SimError

ALONE, TOGETHER = 0.1, 0.9  # share of a step during which another device was busy: at most, at least
FEWEST = 5  # steps of a kind, alone and together, before they are compared


class Ran(NamedTuple):
    """A step that was run. kind: service, and what it did. seconds: measured; expected: as learnt."""

    device: int
    kind: tuple[str, str]
    began: float
    ended: float
    seconds: float
    expected: float


class Slowdown(NamedTuple):
    """Of one kind of steps. factor: how many times longer they took. together: seconds, measured."""

    kind: tuple[str, str]
    alone_steps: int
    together_steps: int
    together: float
    factor: float


def steps_of(run: Path) -> Iterator[Ran]:
    """The steps of a run, as they ended. Raises SimError and ValueError."""
    profiles = read_profiles(run.with_name(run.name + ".profiles"))
    node, records = read(run.with_name(run.name + ".journal"))
    sent: dict[tuple[int, int], msg.Step] = {}
    for record in records:
        match record.event:
            case ev.FromDevice(device, msg.StepDone(number, _, seconds)) if (device, number) in sent:
                step = sent.pop((device, number))
                tokens = sum(row.count for row in step.rows)
                drawing = sum(row.sample for row in step.rows)
                context = sum(row.start + row.count for row in step.rows)
                kind = step.service, "decode" if tokens == drawing else "prompt"
                expected = profiles[step.service].costs.predict(tokens, context, drawing)
                yield Ran(device, kind, record.now - seconds, record.now, seconds, expected)
        actions = node.handle(record.event, record.now)
        if checksum(actions) != record.actions:
            raise ValueError(f"{run.name}.journal was written by another version")
        for action in actions:
            if isinstance(action, ev.ToDevice) and isinstance(action.message, msg.Step):
                sent[action.device, action.message.step] = action.message


def slowdowns(steps: Sequence[Ran]) -> list[Slowdown]:
    """Of each kind of which there are enough, alone and together."""
    alone, together = (
        defaultdict[tuple[str, str], list[Ran]](list),
        defaultdict[tuple[str, str], list[Ran]](list),
    )
    for step in steps:
        busy = _busy(step, steps)
        if busy <= ALONE:
            alone[step.kind].append(step)
        elif busy >= TOGETHER:
            together[step.kind].append(step)
    return [
        Slowdown(
            kind,
            len(alone[kind]),
            len(together[kind]),
            sum(step.seconds for step in together[kind]),
            _ratio(together[kind]) / _ratio(alone[kind]),
        )
        for kind in sorted(alone)
        if min(len(alone[kind]), len(together[kind])) >= FEWEST
    ]


def _busy(step: Ran, steps: Iterable[Ran]) -> float:
    """Share of a step during which another device ran one. Of several other devices, the sum."""
    others = (other for other in steps if other.device != step.device)
    both = sum(max(0.0, min(step.ended, other.ended) - max(step.began, other.began)) for other in others)
    return both / (step.ended - step.began)


def _ratio(steps: Sequence[Ran]) -> float:
    return sum(step.seconds for step in steps) / sum(step.expected for step in steps)


def pooled(found: Sequence[Slowdown]) -> float:
    """By how much steps are slower in all, as a share, weighted by their time."""
    return sum(each.together for each in found) / sum(each.together / each.factor for each in found) - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="How steps on several devices slow each other down.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="path without .journal and .profiles"
    )
    options = parser.parse_args(arguments)
    found: list[Slowdown] = []
    for run in options.runs:
        try:
            here = slowdowns(list(steps_of(run)))
        except (OSError, ValueError, SimError) as error:
            print(f"bench_contention: {error}", file=sys.stderr)
            return 2
        found += here
        for each in here:
            print(
                f"{run.name}: {', '.join(each.kind)}: {each.alone_steps} steps alone, "
                f"{each.together_steps} together ({each.together:.1f} s): {each.factor:.3f} times as long"
            )
    if not found:
        print("bench_contention: too few steps alone, or together", file=sys.stderr)
        return 2
    print(f"contention: {pooled(found):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

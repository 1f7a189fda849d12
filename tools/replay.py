"""Runs a journal again: the same events into a new node, and the same actions out of it.

    python tools/replay.py FILE [--show N] [--check]

Exit code 0 when every event led to the actions that the daemon recorded, 1 at the first that did not (with
the event, the actions, and the node's report), 2 when the file is not a journal.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path

import msgspec

from seallmd.core.events import Action
from seallmd.core.node import Node
from seallmd.runtime.journal import Record, checksum, read


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run a seallmd journal again.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the last N events")
    parser.add_argument("--check", action="store_true", help="check every invariant after every event (slow)")
    options = parser.parse_args(arguments)
    try:
        settings, records = read(options.file)
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    node = Node(settings)
    recent: deque[Record] = deque(maxlen=options.show)
    count = 0
    now = 0.0
    for record in records:
        actions = node.handle(record.event, record.now)
        count, now = count + 1, record.now
        recent.append(record)
        if checksum(actions) != record.actions:
            _report_difference(count, record, actions, node)
            return 1
        if options.check:
            node.check()
    for record in recent:
        print(f"{record.now:12.6f} {record.event}")
    print(f"{count} events in {now:.3f} s of the daemon's time: the same actions")
    return 0


def _report_difference(count: int, record: Record, actions: list[Action], node: Node) -> None:
    print(f"event {count} at {record.now:.6f} s led to other actions here:")
    print(f"  event: {record.event}")
    for action in actions:
        print(f"  now:   {action}")
    print(msgspec.json.format(msgspec.json.encode(node.status(record.now)), indent=2).decode())


if __name__ == "__main__":
    sys.exit(main())

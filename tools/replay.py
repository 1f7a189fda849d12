"""Runs a journal, or a dump of the flight recorder, again: the same events, and the same actions out of them.

    python tools/replay.py FILE [--show N] [--check]

Exit code 0 when every event led to the actions that the daemon recorded, 1 at the first that failed or did
not (with the event, the actions, and the node's report), 2 when the file is not a journal.
"""

from __future__ import annotations

import argparse
import sys
import traceback
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
        node, records = read(options.file)
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    recent: deque[Record] = deque(maxlen=options.show)
    count = 0
    now = 0.0
    for record in records:
        try:
            actions = node.handle(record.event, record.now)
        except Exception as error:  # noqa: BLE001 - what the daemon died of, most likely
            print(f"event {count + 1} at {record.now:.6f} s: {type(error).__name__}: {error}")
            print(f"  event: {record.event}")
            traceback.print_exc()
            return 1
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

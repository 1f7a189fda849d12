"""The `seallmd` command's entry.

Owns the order of a start: what workers need takes longest to import, so the fork server begins with that
before the daemon imports what it needs itself.
"""

from __future__ import annotations

import sys

from seallmd.runtime.forkserver import ForkServer

_BRIEF = {"--check", "--version", "--help", "-h"}  # ends before it would start anything


def main() -> int:
    """Run the daemon; returns its exit code."""
    forkserver = ForkServer()
    if _BRIEF.isdisjoint(sys.argv):
        forkserver.start()
    from seallmd.runtime.daemon import main as daemon_main

    try:
        return daemon_main(forkserver)
    finally:
        forkserver.close()


if __name__ == "__main__":
    sys.exit(main())

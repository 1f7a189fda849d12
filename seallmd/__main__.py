"""The `seallmd` command's entry.

Owns nothing: it imports the daemon only when called, because every spawned worker imports this module too.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the daemon; returns its exit code."""
    from seallmd.runtime.daemon import main as daemon_main

    return daemon_main()


if __name__ == "__main__":
    sys.exit(main())

"""seallmctl: the operator's command line.

Owns arguments and exit codes: 0 done, 2 wrong name, state or usage, 3 no daemon answers. Must not know the
daemon beyond its control socket. `rich` is imported only where something is drawn: --json starts faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from seallmd import __version__
from seallmd.ctl import client
from seallmd.errors import ControlError, Unreachable
from seallmd.paths import find_control_socket

EXIT_REFUSED = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    arguments = _parser().parse_args(argv)
    path = getattr(arguments, "socket", None) or find_control_socket()
    try:
        _VERBS[arguments.verb](path, arguments)
        sys.stdout.flush()
    except ControlError as error:
        return _fail(arguments, str(error), EXIT_REFUSED)
    except Unreachable as error:
        return _fail(arguments, str(error), EXIT_UNREACHABLE)
    except KeyError as error:
        return _fail(arguments, f"the daemon is of another version: it tells no {error}", EXIT_UNREACHABLE)
    except BrokenPipeError:  # `seallmctl status | head -1` is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--socket", type=Path, metavar="PATH", help="control socket of the daemon")
    common.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser = argparse.ArgumentParser(
        prog="seallmctl", description="Look at and steer seallmd.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"seallmctl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("status", parents=[common], help="devices and services")
    load = verbs.add_parser("load", parents=[common], help="bring a service in and wait until it is resident")
    load.add_argument("service", metavar="NAME")
    evict = verbs.add_parser("evict", parents=[common], help="take a service out once its work is done")
    evict.add_argument("service", metavar="NAME")
    evict.add_argument("--now", action="store_true", help="end its requests")
    return parser


def _as_json(arguments: argparse.Namespace) -> bool:
    return getattr(arguments, "json", False)


def _status(path: Path, arguments: argparse.Namespace) -> None:
    report = client.status(path)
    if _as_json(arguments):
        print(json.dumps(report))
        return
    from seallmd.ctl import view

    view.show_status(view.console(), report)


def _load(path: Path, arguments: argparse.Namespace) -> None:
    _follow(arguments, lambda told: client.load(path, arguments.service, told), "is resident")


def _evict(path: Path, arguments: argparse.Namespace) -> None:
    _follow(arguments, lambda told: client.evict(path, arguments.service, arguments.now, told), "is evicted")


def _follow(
    arguments: argparse.Namespace, command: Callable[[Callable[[client.Reply], None]], None], done: str
) -> None:
    """Run a command that takes a while; `command` gets what is to be called with its progress."""
    if _as_json(arguments):
        command(lambda _: None)
        print(json.dumps({"ok": True}))
        return
    from seallmd.ctl import view

    # Progress goes to stderr: stdout carries the result alone.
    with view.JobView(view.console(stderr=True), arguments.service) as job:
        command(job.told)
    print(f"{arguments.service} {done}")


_VERBS = {"status": _status, "load": _load, "evict": _evict}


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    """One line for people on stderr; for programs, also the JSON document that they wait for."""
    if _as_json(arguments):
        print(json.dumps({"ok": False, "error": message}))
    print(f"seallmctl: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Talking to the daemon over its control socket.

Owns the connection and the JSON lines on it. Must not know terminals, nor import anything of the daemon:
the protocol (described in `seallmd/api/control_schema.py`) is all that the two share.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seallmd.errors import ControlError, Unreachable

ANSWER_SECONDS = 10.0

Reply = dict[str, Any]


def status(path: Path) -> Reply:
    """The daemon's report, and about the daemon itself under "daemon". Raises Unreachable or ControlError."""
    reply = _answer(path, {"op": "status"})
    return {**reply["status"], "daemon": reply["daemon"]}


def picture(path: Path, cells: int) -> Reply:
    """Arena maps in so many cells, and recent latencies by service. Raises Unreachable or ControlError."""
    return _answer(path, {"op": "map", "cells": cells})


def show(path: Path, service: str) -> Reply:
    """All that is known of a service. Raises Unreachable or ControlError."""
    return dict(_answer(path, {"op": "show", "service": service})["service"])


def requests(path: Path) -> list[Reply]:
    """Every request that is not over. Raises Unreachable or ControlError."""
    return list(_answer(path, {"op": "requests"})["requests"])


def batches(path: Path) -> list[Reply]:
    """Batches that go on, and the last that are over. Raises Unreachable or ControlError."""
    return list(_answer(path, {"op": "batches"})["batches"])


def cancel_batch(path: Path, batch: str) -> None:
    """End a batch. Raises Unreachable or ControlError."""
    _answer(path, {"op": "batches", "cancel": batch})


def plan(path: Path) -> Reply | None:
    """The plans in force and best known; None while nothing is planned. Raises as `show`."""
    found: Reply | None = _answer(path, {"op": "plan"})["plan"]
    return found


def cancel(path: Path, request: int) -> None:
    """End a request. Raises Unreachable or ControlError."""
    _answer(path, {"op": "cancel", "request": request})


def load(path: Path, service: str, devices: list[int], told: Callable[[Reply], None]) -> None:
    """Bring a service in, to named devices if any, and wait; `told` gets each progress line.

    Raises Unreachable or ControlError.
    """
    _ask(path, {"op": "load", "service": service, "devices": devices}, told, None)


def evict(path: Path, service: str, now: bool, told: Callable[[Reply], None]) -> None:
    """Take a service out and wait; `told` gets each progress line. Raises Unreachable or ControlError."""
    _ask(path, {"op": "evict", "service": service, "now": now}, told, None)


def pin(path: Path, service: str, on: bool) -> None:
    """Keep a service from leaving, or no longer. Raises Unreachable or ControlError."""
    _answer(path, {"op": "pin", "service": service, "on": on})


def drain(path: Path, target: Reply, on: bool, told: Callable[[Reply], None]) -> None:
    """Drain a service ({"service": name}), a device ({"device": index}) or all ({}), and wait.

    on: False takes it back. Raises Unreachable or ControlError.
    """
    _ask(path, {"op": "drain", **target, "on": on}, told, None)


def reload(path: Path) -> Reply:
    """Have the configuration read again: {"changed": [...], "restart": [...]}. Raises as `pin`."""
    reply = _answer(path, {"op": "reload"})
    return {key: reply[key] for key in ("changed", "restart")}


def events(path: Path, last: int, follow: bool, told: Callable[[Reply], None]) -> None:
    """The last events and, if wanted, all that follow until the daemon ends. Raises as `pin`."""
    request = {"op": "events", "last": last, "follow": follow}
    _ask(path, request, lambda reply: told(reply["event"]), None if follow else ANSWER_SECONDS)


def _answer(path: Path, request: Reply) -> Reply:
    return _ask(path, request, _ignore, ANSWER_SECONDS)


def _ignore(_reply: Reply) -> None:
    pass


def _ask(path: Path, request: Reply, told: Callable[[Reply], None], seconds: float | None) -> Reply:
    """Send a request and return the reply that ends it. seconds: longest wait for a line, None = for ever."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            connection.settimeout(seconds)
            with connection.makefile("rb") as lines:
                return _last_reply(lines, told)
    except TimeoutError:
        raise Unreachable(f"the daemon on {path} does not answer") from None
    except PermissionError:
        raise Unreachable(f"permission denied on {path}") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise Unreachable(f"no daemon answers on {path} (is seallmd running?)") from None
    except OSError as error:
        raise Unreachable(f"no daemon answers on {path}: {error.strerror or error}") from None


def _last_reply(lines: Any, told: Callable[[Reply], None]) -> Reply:
    for line in lines:
        try:
            reply = json.loads(line)
            kind = reply["kind"]
        except (ValueError, KeyError, TypeError):
            raise Unreachable("what answers on this socket is not seallmd") from None
        if kind == "error":
            raise ControlError(reply["message"])
        if kind not in ("progress", "event"):
            return dict(reply)
        told(reply)
    raise Unreachable("the daemon hung up before the command ended")

"""The control socket of a real daemon under fire: it answers, does not grow, and its log has no traceback."""

from __future__ import annotations

import json
import random
import socket
import struct
from pathlib import Path

import psutil

from tests.e2e.daemon import Daemon
from tests.worker.helpers import save_tiny

MIB = 1 << 20
CONNECTIONS = 400
COMMANDS: tuple[dict[str, object], ...] = (
    {"op": "status"},
    {"op": "map", "cells": 40},
    {"op": "show", "service": "a"},
    {"op": "requests"},
    {"op": "plan"},
    {"op": "cancel", "request": 1},
    {"op": "load", "service": "a"},
    {"op": "evict", "service": "a", "now": True},
    {"op": "pin", "service": "a", "on": False},
    {"op": "drain", "device": 0, "on": False},
    {"op": "events", "follow": True, "last": 5},
    {"op": "reload"},
)
VALUES = (None, True, -1, 1 << 70, 1e308, "", "a" * 5000, "../../etc/passwd", [], {}, [[[]]])


def line_of(draw: random.Random) -> bytes:
    """A command as it should be, one that is damaged, or noise."""
    command = dict(draw.choice(COMMANDS))
    if draw.random() < 0.4:
        command[draw.choice([*command, "service", "zzz"])] = draw.choice(VALUES)
    line = bytearray(json.dumps(command).encode())
    for _ in range(draw.choice((0, 0, 1, 3))):
        line[draw.randrange(len(line))] = draw.randrange(256)
    return draw.choice((bytes(line), bytes(line), draw.randbytes(draw.randint(0, 300)))) + b"\n"


def converse(daemon: Daemon, draw: random.Random) -> None:
    """Say something on a connection of its own, and end it in one of the ways in which connections end."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(daemon.control))
        said = b"".join(line_of(draw) for _ in range(draw.randint(1, 6)))
        try:
            sock.sendall(said[: draw.choice((len(said), draw.randrange(len(said) + 1)))])
            if draw.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            elif draw.random() < 0.3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (ConnectionError, TimeoutError):
            return  # hung up on, or a follower of events: both are well


def test_the_control_socket_of_a_real_daemon(tmp_path: Path) -> None:
    """Hundreds of conversations, then all is as before; what they drained is undrained for that."""
    save_tiny(tmp_path / "a")
    config = '[devices]\nkind = "cpu"\ncpu_workers = 1\nthreads = 1\nmemory = "768 KiB"\nblock = "8 KiB"\n'
    config += f'[[service]]\nname = "a"\nmodel = "{tmp_path / "a"}"\n'
    daemon = Daemon(tmp_path, config)
    draw = random.Random(8)
    try:
        daemon.wait_healthy()
        process = psutil.Process(daemon.process.pid)
        for _ in range(20):
            converse(daemon, draw)
        descriptors, memory = process.num_fds(), process.memory_info().rss
        for _ in range(CONNECTIONS):
            converse(daemon, draw)
        daemon.until(lambda: process.num_fds() <= descriptors + 4, "the end of all connections", 30)
        assert process.memory_info().rss < memory + 32 * MIB
        for arguments in (("undrain",), ("undrain", "a"), ("undrain", "--device", "0")):
            daemon.ctl(*arguments)
        answer = daemon.client().completions.create(model="a", prompt=[5, 6], max_tokens=2)
        assert answer.usage is not None
        assert "Traceback" not in daemon.log.read_text(errors="replace")
        assert daemon.stop() == 0
    finally:
        daemon.kill()

"""The faults that come at any moment: each does its harm at once, through what the outside has in its hands.

Owns those faults; the ones that wait for a moment are in `phases`. Must not judge: `storm` does, after each.
A fault that leaves something changed (a damaged file, a limit) returns how that is mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.chaos.storm import Storm

Mend = Callable[[], None]
Fault = Callable[["Storm"], Awaitable[Mend | None]]

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
_NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


async def kill_worker(storm: Storm) -> None:
    """A device's process is gone, whatever it was doing."""
    send_signal(storm.pick("seallmd-cpu"), signal.SIGKILL)


async def hang_worker(storm: Storm) -> None:
    """It stops and never goes on: the daemon has to notice by itself, once it owes something."""
    send_signal(storm.pick("seallmd-cpu"), signal.SIGSTOP)


async def slow_worker(storm: Storm) -> None:
    """Steps and copies stand still for a moment."""
    await _pause(storm.pick("seallmd-cpu"), storm.random.uniform(0.05, 0.6))


async def kill_loader(storm: Storm) -> None:
    """The host process is gone, with its images."""
    send_signal(storm.pick("seallmd-host"), signal.SIGKILL)


async def slow_copies(storm: Storm) -> None:
    """A worker gets a tenth of its time: copies, in pieces between steps, take ten times as long."""
    pid = storm.pick("seallmd-cpu")
    for _ in range(25):
        await _pause(pid, 0.018)
        await asyncio.sleep(0.002)


async def failing_copies(storm: Storm) -> Mend | None:
    """A worker can open no file more, so that it cannot map what it is to copy."""
    pid = storm.pick("seallmd-cpu")
    if pid is None:
        return None
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(entry) for entry in os.listdir(f"/proc/{pid}/fd")}
    lowest = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    await storm.command({"op": "load", "service": storm.random.choice(storm.services)}, 2)
    return lambda: _limit_again(pid, resource.RLIMIT_NOFILE, before)


async def slow_loader(storm: Storm) -> None:
    """Reading stands still for a moment."""
    await _pause(storm.pick("seallmd-host"), storm.random.uniform(0.05, 0.6))


async def jump_clock(storm: Storm) -> None:
    """The daemon itself stands still for longer than a hung worker may: when it wakes up, nobody has hung."""
    await _pause(storm.daemon.process.pid, storm.hung_seconds * storm.random.uniform(0.5, 1.5))


async def full_memory(storm: Storm) -> Mend | None:
    """A worker, or the loader, gets no more memory than it has."""
    pid = storm.pick(storm.random.choice(("seallmd-cpu", "seallmd-cpu", "seallmd-host")))
    if pid is None:
        return None
    limit = _data_bytes(pid) + storm.random.choice((0, 1 << 20))
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    return lambda: _limit_again(pid, resource.RLIMIT_DATA, _NO_LIMIT)


async def corrupt_file(storm: Storm) -> Mend:
    """A model's weights are cut or overwritten, and have to be read anew."""
    file = storm.models / storm.random.choice(storm.services) / "model.safetensors"
    whole = file.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "lies": struct.pack("<Q", 1 << 62) + whole[8:],
        "noise": storm.random.randbytes(4096),
    }[storm.random.choice(("cut", "empty", "lies", "noise"))]
    _replace(file, damaged)
    send_signal(storm.pick("seallmd-host"), signal.SIGKILL)
    await asyncio.sleep(storm.random.uniform(0.0, 2.0))

    def mend() -> None:
        _replace(file, whole)

    return mend


async def cut_connection(storm: Storm) -> None:
    """A client resets its connection, somewhere between its first byte and the last of its answer."""
    sock = _open(storm)
    await _send(sock, storm.http_request(stream=True))
    await asyncio.sleep(storm.random.uniform(0.0, 0.3))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


async def half_close(storm: Storm) -> None:
    """A client says that it will say no more, and leaves a little later."""
    sock = _open(storm)
    await _send(sock, storm.http_request(stream=storm.random.random() < 0.5))
    sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(storm.random.uniform(0.0, 0.3))
    sock.close()


async def half_request(storm: Storm) -> None:
    """A client stops in the middle of its own request."""
    sock = _open(storm)
    whole = storm.http_request(stream=False)
    await _send(sock, whole[: storm.random.randrange(1, len(whole))])
    await asyncio.sleep(storm.random.uniform(0.0, 0.1))
    sock.close()


async def slow_readers(storm: Storm) -> None:
    """Clients that ask for streams and do not read them."""
    socks = [_open(storm) for _ in range(8)]
    for sock in socks:
        await _send(sock, storm.http_request(stream=True))
    await asyncio.sleep(storm.random.uniform(0.1, 0.5))
    for sock in socks:
        sock.close()


async def evict(storm: Storm) -> None:
    """An operator throws a model out, with its requests or after them."""
    now = storm.random.random() < 0.5
    await storm.command({"op": "evict", "service": storm.random.choice(storm.services), "now": now}, 20)


async def load(storm: Storm) -> None:
    """An operator wants a model."""
    await storm.command({"op": "load", "service": storm.random.choice(storm.services)}, 20)


async def leave_command(storm: Storm) -> None:
    """An operator hangs up in the middle of a command, which goes on."""
    await storm.command({"op": "load", "service": storm.random.choice(storm.services)}, 0.0)


async def babble(storm: Storm) -> None:
    """Nonsense on the control socket and on HTTP."""
    for address in (str(storm.daemon.control), ("127.0.0.1", storm.daemon.port)):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            await _send(sock, storm.random.randbytes(storm.random.randint(1, 4000)) + b"\n\r\n\r\n")


async def reload(storm: Storm) -> Mend:
    """The configuration is read again while it is wrong."""
    file = storm.daemon.directory / "seallmd.toml"
    whole = file.read_text()
    file.write_text(whole[: storm.random.randrange(1, len(whole))] + "\n= = =")
    storm.daemon.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.05)
    return lambda: file.write_text(whole) and None


def send_signal(pid: int | None, number: signal.Signals) -> None:
    """To a process that may have ended meanwhile; there is none while it is starting."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def _pause(pid: int | None, seconds: float) -> None:
    send_signal(pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    send_signal(pid, signal.SIGCONT)


def _data_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


def _limit_again(pid: int, what: int, limits: tuple[int, int]) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, what, limits)


def _replace(file: os.PathLike[str], contents: bytes) -> None:
    """As a careful program does it: who has the old file mapped keeps it."""
    new = f"{file}.new"
    with open(new, "wb") as out:
        out.write(contents)
    os.replace(new, file)


def _open(storm: Storm) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", storm.daemon.port))
    sock.setblocking(False)
    return sock


async def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the daemon hung up on it, which it may
        await asyncio.get_running_loop().sock_sendall(sock, data)


def http_request(port: int, body: dict[str, object]) -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

"""The daemon and whoever started it: sd_notify and socket activation, without libsystemd.

Owns systemd's two protocols (sd_notify(3), sd_listen_fds(3)) and the environment variables that belong to
them. Must not know what the daemon does. Without systemd nothing is told and nothing inherited.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from seallmd.errors import ConfigError

log = logging.getLogger(__name__)

_FIRST_INHERITED = 3  # the first descriptor that is handed over, SD_LISTEN_FDS_START
_STATUS_BYTES = 500  # a sentence for `systemctl status`
_LONGEST_NAME = 80  # characters of a socket's name that an error shows


class Notifier:
    """Tells the service manager how the daemon is. Telling never blocks and never fails.

    address: of its datagram socket, a path or "@abstract"; empty = there is nobody to tell.
    watchdog_seconds: how long it bears our silence; 0 = for ever.
    """

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._told = ""
        # The kernel marks an abstract address by a zero byte in front, systemd by an @.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self) -> None:
        """The sockets accept, or a reload is over."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """All is well: the watchdog waits anew."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Starting or stopping goes on for so long from now, at least; then this has to be told again."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, sentence: str) -> None:
        """A sentence for `systemctl status`; sent when it differs from the last one."""
        line = " ".join(sentence.split()).encode()[:_STATUS_BYTES].decode(errors="ignore")
        if line != self._told:
            self._told = line
            self._send(f"STATUS={line}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError as error:  # a manager that is away or busy must not stop us
            log.debug("the service manager was not told %s: %s", text, error)


def take_notifier(environment: MutableMapping[str, str]) -> Notifier:
    """The notifier that the environment asks for. Its variables are removed: our children must not tell."""
    address = environment.pop("NOTIFY_SOCKET", "")
    microseconds = environment.pop("WATCHDOG_USEC", "")
    # Of another process if it names one: a wrapper script's, say.
    ours = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    seconds = int(microseconds) / 1e6 if ours and microseconds.isdecimal() else 0.0
    return Notifier(address, seconds)


def take_listeners(
    environment: MutableMapping[str, str],
    names: tuple[str, ...],
    open_: Callable[[int], socket.socket] = lambda descriptor: socket.socket(fileno=descriptor),
) -> dict[str, list[socket.socket]]:
    """The listening sockets that were handed over, by the names (FileDescriptorName=) that they may have.

    Raises ConfigError for one that has another name or does not listen. Removes the variables.
    """
    count = environment.pop("LISTEN_FDS", "")
    pid = environment.pop("LISTEN_PID", "")
    given = environment.pop("LISTEN_FDNAMES", "")
    found: dict[str, list[socket.socket]] = {name: [] for name in names}
    if not count.isdecimal() or pid != str(os.getpid()):
        return found
    labels = given.split(":") if given else []
    for index in range(int(count)):
        label = labels[index] if index < len(labels) else "unknown"
        if label not in found:
            wanted = " or ".join(names)
            shown = label[:_LONGEST_NAME]
            raise ConfigError(f"a socket named {shown!r} was handed over: FileDescriptorName= is {wanted}")
        found[label].append(_listener(open_(_FIRST_INHERITED + index), label))
    return found


def _listener(sock: socket.socket, label: str) -> socket.socket:
    try:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"the socket {label!r} that was handed over is none: {error.strerror}") from error
    if not listens or sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"the socket {label!r} that was handed over does not accept connections")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock

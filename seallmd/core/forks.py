"""What the daemon and the fork server say to each other.

Owns these messages alone; what the daemon says to the forked processes is in `messages`. One message is one
packet of a SOCK_SEQPACKET pair, so there is no framing. Must not know sockets or processes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from seallmd.core.messages import WorkerSettings

Kind = Literal["worker", "host"]

MAX_PACKET_BYTES = 1 << 16


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a process; the packet carries the descriptor of its end of the socket to the daemon.

    child: a number by which to speak of it, never used twice.
    """

    child: int
    kind: Kind
    settings: WorkerSettings


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End a process with SIGKILL; ignored when it is gone."""

    child: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """The process is gone. code: its exit code, or minus the signal that ended it."""

    child: int
    code: int


ToForkServer = Fork | Kill

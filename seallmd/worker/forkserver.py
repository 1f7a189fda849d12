"""The fork server: it has imported what workers and the host process need, and forks them.

`python -m seallmd.worker.forkserver DESCRIPTOR PARENT`. To import torch and transformers takes seconds of CPU
time; here it is done once, whatever the number of children, a child that died is soon there again, and the
imported code is in memory once.

Owns the birth of children, their death by order, and the notice of it. It has one thread and touches no
device: neither threads nor CUDA survive a fork. Must not know what the children do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import NoReturn

import msgspec

from seallmd.core.forks import MAX_PACKET_BYTES, Exited, Fork, Kill, ToForkServer

_DECODER = msgspec.msgpack.Decoder(ToForkServer)


def preload() -> None:
    """Import what every child needs; what it will never free is kept from its garbage collector."""
    gc.disable()  # to look at all modules again and again takes a quarter of the import's time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's pool: a thread that no fork would have
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a library that asks for GPUs starts no CUDA
    import seallmd.worker.host
    import seallmd.worker.main  # noqa: F401

    gc.freeze()
    gc.enable()


class ForkServer:
    """Children and their descriptors (pidfd). sock: the daemon's other end is the only one who asks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, int]] = {}  # pid, pidfd

    def serve(self) -> None:
        """Until the daemon closes its end."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._sock:
                    self._reap(key.data)
                elif not self._receive():
                    return

    def _receive(self) -> bool:
        packet, descriptors, _, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES, 1)
        if not packet:
            return False
        match _DECODER.decode(packet):
            case Fork() as job:
                self._fork(job, descriptors[0])
            case Kill(child):
                if child in self._children:
                    signal.pidfd_send_signal(self._children[child][1], signal.SIGKILL)
        return True

    def _fork(self, job: Fork, descriptor: int) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no memory, or too many processes: nobody else has to end for that
            os.close(descriptor)
            print(f"seallmd: {job.settings.name} cannot be forked: {error.strerror}", file=sys.stderr)
            self._tell(Exited(job.child, os.EX_OSERR))
            return
        if pid == 0:
            self._become(job, socket.socket(fileno=descriptor), server)
        os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._children[job.child] = (pid, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, job.child)

    def _become(self, job: Fork, sock: socket.socket, server: int) -> NoReturn:
        """Live as the child."""
        code = 1
        try:
            from seallmd.worker import host, main, process

            process.bind_to_parent(server)
            self._selector.close()
            self._sock.close()
            for _, pidfd in self._children.values():
                os.close(pidfd)
            os.set_inheritable(sock.fileno(), False)
            run = main.run if job.kind == "worker" else host.run
            run(msgspec.json.encode(job.settings), sock)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - the end of a process: nothing may go on in the server's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self, child: int) -> None:
        pid, pidfd = self._children.pop(child)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell(Exited(child, os.waitstatus_to_exitcode(status)))

    def _tell(self, end: Exited) -> None:
        self._sock.send(msgspec.msgpack.encode(end))


def main() -> None:
    """Command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the daemon
    descriptor, parent = map(int, sys.argv[1:])
    preload()
    from seallmd.worker.process import bind_to_parent, name_process

    bind_to_parent(parent)  # with it end all the children, which are bound to this process
    name_process("forks")
    with contextlib.suppress(ConnectionError):  # the daemon is gone
        ForkServer(socket.socket(fileno=descriptor)).serve()


if __name__ == "__main__":
    main()

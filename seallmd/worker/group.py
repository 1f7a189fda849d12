"""The process group of one tensor-parallel replica.

Owns joining and leaving, the collectives, and what happens when a member is lost. Must not know models.

There is no default process group: c10d's backends are used directly, each over a file store of its own, so
that groups may come, go and overlap, and a member that starts anew meets nobody's old state. A group dies
with its first error: a member that leaves in the middle of a step closes its connections (gloo) or says so
in the store (NCCL), and the others' collectives raise instead of waiting for it.

The CUDA half has been run nowhere yet: it is unmeasured.
"""

from __future__ import annotations

import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from seallmd.core.messages import Group

# Members are told at about the same time, but one may be in the middle of a long step or an import.
JOIN_SECONDS = 60.0
# A member that lives, but does not come to the collective: it is stuck, or the steps were sent in two orders.
STEP_SECONDS = 60.0
_POLL_SECONDS = 0.0001
_LOOPBACK = "127.0.0.1"


class GroupLost(Exception):
    """A member is gone or did not come in time; the group is of no more use."""


class ProcessGroup(ABC):
    """One member's end of a group; implements `parallel.Peers`. Every method may raise GroupLost.

    After an error, and at the end, `leave` has to be called.
    """

    def __init__(self, group: Group) -> None:
        self.rank, self.ranks = group.rank, group.ranks

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """As `Peers.sum`; in place."""
        part = part.contiguous()
        self._reduce(part)
        return part

    def concatenate(self, part: torch.Tensor) -> torch.Tensor:
        """As `Peers.concatenate`."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        self._gather(parts, part.contiguous())
        return torch.cat(parts, -1)

    def meet(self, device: torch.device) -> None:
        """Return once all members have come."""
        self._broadcast(torch.zeros(1, dtype=torch.long, device=device))
        self.finish()

    def agree(self, tokens: torch.Tensor) -> list[int]:
        """Rank 0's token ids [n] int64, on every rank; the others bring a tensor of the same size.

        A step ends with this or with `finish`: nothing of it is under way afterwards.
        """
        self._broadcast(tokens)
        self.finish()
        drawn: list[int] = tokens.tolist()
        return drawn

    @abstractmethod
    def finish(self) -> None:
        """Wait for the collectives that were begun."""

    @abstractmethod
    def leave(self) -> None:
        """Give up membership: nothing may be called afterwards. Others that wait for us get GroupLost."""

    @abstractmethod
    def _reduce(self, part: torch.Tensor) -> None: ...

    @abstractmethod
    def _gather(self, parts: list[torch.Tensor], part: torch.Tensor) -> None: ...

    @abstractmethod
    def _broadcast(self, tensor: torch.Tensor) -> None: ...


class Joining:
    """A member that waits for the others in a thread of its own, while its worker goes on stepping.

    A thread each: two groups may be joined by their members in different orders.
    """

    def __init__(self, group: Group, device: torch.device, rendezvous: Path) -> None:
        self._result: Future[ProcessGroup] = Future()
        self._until = time.monotonic() + 2 * JOIN_SECONDS  # the backends have limits, but not for every wait
        self._given_up = False
        self._lock = threading.Lock()
        arguments = (group, device, rendezvous)
        threading.Thread(target=self._join, args=arguments, name=f"join {group.id}", daemon=True).start()

    def done(self) -> bool:
        """Whether `take` has something to say."""
        return self._result.done() or time.monotonic() > self._until

    def take(self) -> ProcessGroup:
        """The group, once `done`. Raises GroupLost if not everybody came in time."""
        if not self._result.done():
            raise GroupLost("its tensor-parallel group did not come together (timeout)")
        return self._result.result()

    def give_up(self) -> None:
        """The group is not wanted any more, whenever it comes to be."""
        with self._lock:
            self._given_up = True
        if self._result.done() and self._result.exception() is None:
            self._result.result().leave()

    def _join(self, group: Group, device: torch.device, rendezvous: Path) -> None:
        try:
            joined = _join(group, device, rendezvous)
        except Exception as error:  # noqa: BLE001 - it goes to whoever takes the result
            self._result.set_exception(error)
            return
        with self._lock:
            if not self._given_up:
                self._result.set_result(joined)
                return
        joined.leave()


def _join(group: Group, device: torch.device, rendezvous: Path) -> ProcessGroup:
    """Wait for all members. Blocks; raises GroupLost, OSError."""
    path = rendezvous / f"group-{group.id}"
    kind = NcclGroup if device.type == "cuda" else GlooGroup
    try:
        with _stream_of_its_own(device):
            store = distributed.FileStore(str(path), group.ranks)
            store.set_timeout(timedelta(seconds=JOIN_SECONDS))
            joined = kind(group, store, device)
            # The backends connect when they please; a member counts as joined once it has met all others.
            joined.meet(device)
    except RuntimeError as error:  # c10d's errors
        path.unlink(missing_ok=True)
        raise GroupLost(f"its tensor-parallel group did not come together ({_short(error)})") from error
    return joined


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """On a GPU a collective waits for the current stream, and has it wait: a thread's is the one that steps
    run on, and members that step in one group and join another there, in two orders, would wait for ever."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)  # of this thread
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def _short(error: BaseException) -> str:
    """c10d's messages begin with a place in its source and end with a stack."""
    line = str(error).partition("\n")[0]
    return line.partition("] ")[2][:120] or line[:120]


def _lost(error: BaseException) -> GroupLost:
    return GroupLost(f"a member of its tensor-parallel group was lost ({_short(error)})")


# ------------------------------------------------------------------------------------------------- CPU


class GlooGroup(ProcessGroup):
    """Over TCP on the loopback interface. A dead member's connections are closed: that is the alarm."""

    def __init__(self, group: Group, store: distributed.Store, _: torch.device) -> None:
        super().__init__(group)
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        options._threads = 1  # one collective at a time
        backend = distributed.ProcessGroupGloo(store, group.rank, group.ranks, options)
        backend._set_default_timeout(timedelta(seconds=STEP_SECONDS))
        self._backend: distributed.ProcessGroupGloo | None = backend

    def finish(self) -> None:
        """Every collective has ended when its call returns."""

    def leave(self) -> None:
        """Closes the connections: gloo does that when nothing refers to the backend any more."""
        self._backend = None

    def _reduce(self, part: torch.Tensor) -> None:
        self._wait(lambda backend: backend.allreduce([part]))

    def _gather(self, parts: list[torch.Tensor], part: torch.Tensor) -> None:
        self._wait(lambda backend: backend.allgather([parts], [part]))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._wait(lambda backend: backend.broadcast(tensor, 0))

    def _wait(self, begin: Callable[[Any], Any]) -> None:
        if self._backend is None:
            raise GroupLost("its tensor-parallel group was left")
        try:
            begin(self._backend).wait()
            return
        except RuntimeError as error:
            lost = _lost(error)
        raise lost  # with nothing behind it: a traceback would keep the backend's connections open


# ------------------------------------------------------------------------------------------------- CUDA


class NcclGroup(ProcessGroup):
    """Over NVLink or PCIe. NCCL's kernels spin for ever when a member is gone, so `finish` watches the
    others: their processes, a word in the store, and the clock."""

    def __init__(self, group: Group, store: distributed.Store, device: torch.device) -> None:
        super().__init__(group)
        # c10d's own watchdog would end this process, with all its other services, when a collective hangs.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # NoHandling
        self._store, self._device = store, device
        store.set(f"pid {group.rank}", str(os.getpid()))
        pids = [int(store.get(f"pid {rank}")) for rank in range(group.ranks)]
        self._members: Sequence[int] = [os.pidfd_open(pid) for pid in pids if pid != os.getpid()]
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=JOIN_SECONDS)
        self._backend = distributed.ProcessGroupNCCL(store, group.rank, group.ranks, options)
        self._left = False

    def finish(self) -> None:
        """As `ProcessGroup.finish`; aborts the communicator when a member is lost."""
        done = torch.cuda.current_stream(self._device).record_event()
        begun = looked = time.monotonic()
        while not done.query():
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - looked < 100 * _POLL_SECONDS:
                continue
            looked = now
            reason = self._trouble(now - begun)
            if reason is not None:
                self.leave()  # its kernels end, with rubbish in their results
                raise GroupLost(f"a member of its tensor-parallel group was lost ({reason})")

    def leave(self) -> None:
        """As `ProcessGroup.leave`."""
        if self._left:
            return
        self._left = True
        self._store.set("left", "")
        self._backend.abort()
        for descriptor in self._members:
            os.close(descriptor)

    def _trouble(self, waited_seconds: float) -> str | None:
        if self._store.check(["left"]):
            return "it left"
        if any(_has_ended(descriptor) for descriptor in self._members):
            return "its process ended"
        return "timeout" if waited_seconds > STEP_SECONDS else None

    def _reduce(self, part: torch.Tensor) -> None:
        self._begin(lambda: self._backend.allreduce([part]))

    def _gather(self, parts: list[torch.Tensor], part: torch.Tensor) -> None:
        self._begin(lambda: self._backend.allgather([parts], [part]))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._begin(lambda: self._backend.broadcast(tensor, 0))

    def _begin(self, begin: Callable[[], Any]) -> None:
        if self._left:
            raise GroupLost("its tensor-parallel group was left")
        try:
            begin().wait()  # the current stream waits, not this thread
        except RuntimeError as error:
            raise _lost(error) from error


def _has_ended(descriptor: int) -> bool:
    """Whether the process behind a pidfd is gone: the descriptor is then readable."""
    return bool(select.select([descriptor], [], [], 0)[0])

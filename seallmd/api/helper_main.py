"""The main loop of a helper process: the other end of `helper`.

Owns the limits that such a process sets itself. Must not know what jobs are: each is a line of JSON on stdin,
its answer one on stdout, and the process ends with its stdin.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec

_MAX_JOB_SECONDS = 30  # the daemon gives up sooner; this is for when it died meanwhile

Job = TypeVar("Job", bound=msgspec.Struct)


def answer_jobs(kind: type[Job], answer: Callable[[Job], msgspec.Struct], *, memory_bytes: int) -> None:
    """Answer jobs until stdin ends. memory_bytes: most address space that the process may take."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold prompts
    decoder = msgspec.json.Decoder(kind)
    for line in sys.stdin.buffer:
        signal.alarm(_MAX_JOB_SECONDS)  # nobody handles it: it ends the process
        sys.stdout.buffer.write(msgspec.json.encode(answer(decoder.decode(line))) + b"\n")
        sys.stdout.buffer.flush()
        signal.alarm(0)

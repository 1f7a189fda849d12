"""What every child process of the daemon does first, and what it may ask of the machine.

Owns the bond to the parent (a child never outlives it) and the view on free memory. Must not know models.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from seallmd import cgroup
from seallmd.core.messages import WorkerSettings

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PATH = re.compile(r"(?<![\w/:])/(?:[^\s'\"/]+/)*([^\s'\"/]+)")


def bind_to_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends; Linux only.

    parent: pid of the process that started this one; if it is gone already, this process ends at once (the
    kernel reports only deaths that come later). Ignores SIGINT: a Ctrl-C in the terminal reaches the whole
    group, and it is the daemon that decides how its children end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


def name_process(name: str) -> None:
    """What `ps -o comm` and `top` call this process; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"seallmd-{name}".encode()[:15], 0, 0, 0)


def begin(settings_json: bytes) -> WorkerSettings:
    """What a child of the daemon does before anything else; returns what it was started with."""
    parent = multiprocessing.parent_process()
    bind_to_parent(parent.pid if parent is not None else None)
    settings = msgspec.json.decode(settings_json, type=WorkerSettings)
    name_process(settings.name)
    torch.set_num_threads(settings.threads)
    torch.set_num_interop_threads(1)
    quiet_libraries()
    return settings


def tell(line: str) -> None:
    """A line on the daemon's stderr; a disk that is full there is no reason to end."""
    with contextlib.suppress(OSError):
        print(f"seallmd: {line}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep progress bars and advice of the model libraries off the daemon's stderr."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def require_memory(bytes_: int, purpose: str) -> None:
    """Raise MemoryError where machine or container cannot give `bytes_` more: better than being killed."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            left = cgroup.memory_left()
            if left is not None:
                available = min(available, left)
            if bytes_ > available:
                raise MemoryError(
                    f"{purpose} needs {bytes_ >> 20} MiB of memory, {available >> 20} MiB are available"
                )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice, whoever was asked for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator of torch and mmap have no class of their own for it, nor has CUDA where it is not
    # torch's allocator that asks: to load a kernel or to make a graph takes memory too.
    return isinstance(error, RuntimeError | OSError) and any(
        words in str(error) for words in ("not enough memory", "allocate memory", "out of memory")
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether only a new process helps: an error of CUDA stays with its context, but for a lack of memory."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def log_line(name: str) -> Callable[[str], None]:
    """Writes lines to the log in the name of a process."""
    return lambda line: tell(f"{name}: {line}")


def one_line(error: BaseException) -> str:
    """An error as one short line for people; of paths only the last part, since clients may read it too."""
    text = _PATH.sub(r"\1", " ".join(str(error).split()))
    if not text or isinstance(error, LookupError):  # whose text is a bare key or index
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else text[:299] + "…"

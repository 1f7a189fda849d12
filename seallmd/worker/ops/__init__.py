"""Fast operations on a CPU, and what stands in for them where they cannot be had.

`build` compiles the C++ beside it, `native` calls it, `reference` says in plain torch what each operation
means, `modules` and `layers` put them into a module tree. Must not know messages, requests or devices.

A process decides once, with `start`; before that, and where there is no compiler, `compiled()` is None and
every model runs as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from seallmd.worker.ops.build import BuildFailed, make_library
from seallmd.worker.ops.native import Native

_native: Native | None = None


def start(cache: Path, say: Callable[[str], None]) -> str:
    """Load the operations of this machine, compiling them first if need be (some 5 s, once per machine).

    Torch's number of threads must be set. cache: directory for the compiled library. say: told before
    anything that takes time. Returns one line for the log.
    """
    global _native
    try:
        _native = Native(make_library(cache, say))
    except (BuildFailed, OSError) as error:
        _native = None
        return f"plain torch operations: {error}"
    products = ", bfloat16 products" if _native.rounds else ""
    return f"compiled operations, vectors of {_native.vector_floats} floats{products}"


def summary() -> str:
    """What there is, in a few words for a device's label."""
    if _native is None:
        return "plain torch"
    return "compiled, bfloat16 products" if _native.rounds else "compiled"


def stop() -> None:
    """Back to plain torch, for models that are built from here on."""
    global _native
    _native = None


def compiled() -> Native | None:
    """The compiled operations, None where plain torch has to do."""
    return _native

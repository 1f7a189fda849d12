"""Fast operations on a CPU, and what stands in for them where they cannot be had.

`build` compiles the C++ beside it, `native` calls it, `reference` says in plain torch what each operation
means, `modules` and `layers` put them into a module tree. Must not know messages, requests or devices.

A process decides once, with `start`; before that, and where there is no compiler, `native()` is None and
every model runs as transformers wrote it.
"""

from __future__ import annotations

from pathlib import Path

from seallmd.worker.ops.build import BuildFailed, build
from seallmd.worker.ops.native import Native

_native: Native | None = None


def start(cache: Path) -> str:
    """Load the operations of this machine, compiling them first if need be (some 4 s, once per machine).

    cache: directory for the compiled library. Returns one line for the log.
    """
    global _native
    try:
        _native = Native(build(cache))
    except (BuildFailed, OSError) as error:
        _native = None
        return f"plain torch operations: {error}"
    return f"compiled operations, vectors of {_native.vector_floats} floats"


def stop() -> None:
    """Back to plain torch, for models that are built from here on."""
    global _native
    _native = None


def native() -> Native | None:
    """The compiled operations, None where plain torch has to do."""
    return _native

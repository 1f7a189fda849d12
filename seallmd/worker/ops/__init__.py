"""Fast operations on a CPU or a GPU, and what stands in for them where they cannot be had.

For a CPU `build` compiles the C++ beside it, `native` calls it, `modules`, `layers` and `stack` put it into a
module tree. For a GPU `triton_attention` and `triton_rows` hold the operations, `kernels` says which of them
are in use, `gpu_model` puts them into a module tree. `reference` says in plain torch what each operation
means. Must not know messages, requests or devices.

A process decides once, with `start` or `start_kernels`; before that, and where there is no compiler,
`compiled()` and `gpu_kernels()` are None and every model runs as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from seallmd.worker.ops.build import BuildFailed, make_library
from seallmd.worker.ops.native import Native

if TYPE_CHECKING:
    from seallmd.worker.ops.kernels import Kernels

_native: Native | None = None
_kernels: Kernels | None = None


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


def start_kernels(device: torch.device, cache: Path, say: Callable[[str], None]) -> None:
    """Try the Triton operations on a GPU; those that agree are in use from here on (see `kernels.start`)."""
    global _kernels
    from seallmd.worker.ops.kernels import start

    say("trying the Triton operations (compiled once per machine)")
    _kernels = start(device, cache, say)


def summary() -> str:
    """What there is, in a few words for a device's label."""
    if _kernels is not None:
        return f"Triton {', '.join(_kernels.names())}"
    if _native is None:
        return "plain torch"
    return "compiled, bfloat16 products" if _native.rounds else "compiled"


def stop() -> None:
    """Back to plain torch, for models that are built from here on."""
    global _native, _kernels
    _native = _kernels = None


def gpu_kernels() -> Kernels | None:
    """The Triton operations in use on the GPU, None without any."""
    return _kernels


def compiled() -> Native | None:
    """The compiled operations, None where plain torch has to do."""
    return _native

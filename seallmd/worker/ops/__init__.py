"""Fast operations on a CPU or a GPU, and what stands in for them where they cannot be had.

For a CPU `build` compiles the C++ beside it, `native` calls it. For a GPU `triton_attention`, `triton_store`
and `triton_rows` hold the operations and `flash` somebody else's attention; `trials` finds out which of them
are right, `kernels` is what is in use. Into a module tree they come by one way: `modules` recognises norms,
activations and linear layers, `layers` whole decoder layers, `stack` all of them; what runs these is in
`native_layers` and `model` on a CPU, in `gpu_layers` and `gpu_model` on a GPU. `reference` says in plain
torch what each operation means. Must not know messages, requests or devices.

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
    """Try the operations on a GPU; those that agree are in use from here on (see `trials.start`)."""
    global _kernels
    from seallmd.worker.ops.trials import start

    say("trying the Triton operations (compiled once per machine)")
    _kernels = start(device, cache, say)


def summary() -> str:
    """What there is, in a few words for a device's label."""
    if _kernels is not None:
        return _kernels.summary()
    if _native is None:
        return "plain torch"
    return "compiled, bfloat16 products" if _native.rounds else "compiled"


def stop() -> None:
    """Back to plain torch, for models that are built from here on."""
    global _native, _kernels
    _native = _kernels = None


def gpu_kernels() -> Kernels | None:
    """The operations in use on the GPU, None without any."""
    return _kernels


def compiled() -> Native | None:
    """The compiled operations, None where plain torch has to do."""
    return _native

"""The operations of a GPU, each in use only where it agreed with plain torch on that GPU.

Owns which of them are in use: Triton's, and FlashAttention's where it is installed and quicker. `trials` says
what each has to show at a worker's start; a trial that ends the process (a fault of a GPU is fatal to it)
leaves a mark behind, and is not made again. Must not know models or requests, and imports triton only for the
trial.

On a GPU it is unmeasured: nobody has run it there yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from seallmd.worker.attention import Call
from seallmd.worker.kv import KvView
from seallmd.worker.ops.flash import Flash
from seallmd.worker.ops.reference import Norm
from seallmd.worker.quantised import Blocks
from seallmd.worker.tables import Tables

# By their field in `Kernels`, in the order of their trials.
NAMES = {
    "attention": "attention",
    "norm": "norm",
    "gated": "gated",
    "add_norm": "add+norm",
    "rotate": "rotation",
    "in_blocks": "int8 linear",
}


@dataclass(frozen=True)
class Kernels:
    """Operations that agreed; None for one that did not.

    attention: `triton_attention`. write, rotate: of `triton_store`. norm, gated, add_norm: of `triton_rows`.
    in_blocks: `linear` of `triton_linear`. flash: does some of attention's work. processors: multiprocessors
    of the device.
    """

    attention: ModuleType | None = None
    write: Callable[[KvView, Tables, Call], None] | None = None
    norm: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor] | None = None
    gated: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor] | None = None
    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    rotate: Callable[..., torch.Tensor] | None = None
    in_blocks: Callable[[torch.Tensor, Blocks, torch.Tensor | None], torch.Tensor] | None = None
    flash: Flash | None = None
    processors: int = 1

    def attend(self, kv: KvView, tables: Tables, call: Call) -> torch.Tensor:
        """Store the new K and V of a layer, and answer as `Answerer.attend`."""
        need(self.write, "attention")(kv, tables, call)
        return self._answer(kv, tables, call)

    def attend_rotated(
        self,
        kv: KvView,
        tables: Tables,
        call: Call,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_norm: Norm | None,
        k_norm: Norm | None,
    ) -> torch.Tensor:
        """As `attend`, of query and key that are still to be normed, where there are norms, and rotated."""
        query = need(self.rotate, "rotation")(kv, tables, call, cos, sin, q_norm, k_norm)
        return self._answer(kv, tables, call._replace(query=query))

    def _answer(self, kv: KvView, tables: Tables, call: Call) -> torch.Tensor:
        if self.flash is not None and self.flash.takes(kv, tables, call):
            return tables.finite(self.flash.attend(kv, tables, call))
        return tables.finite(need(self.attention, "attention").attend(kv, tables, call, self.processors))

    def names(self) -> list[str]:
        """Of the Triton operations in use, for people."""
        return [name for field, name in NAMES.items() if getattr(self, field) is not None]

    def summary(self) -> str:
        """What is in use, in a few words for a device's label."""
        triton = f"Triton {', '.join(self.names())}"
        return triton if self.flash is None else f"{triton}; {self.flash.names()}"


def need(operation: Any, name: str) -> Any:
    """The operation. Raises RuntimeError where it is not among these kernels."""
    if operation is None:
        raise RuntimeError(f"{name} is not among these kernels")
    return operation

"""The weights of a module tree, wherever they lie.

Owns which tensors the modules hold: views of an arena or of a host image, or none. Must not know how weights
came there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from seallmd.worker.layout import Layout, Place, modules_of


class Location(NamedTuple):
    """Where weights lie: the memory, uint8, and the first byte of each segment there."""

    memory: torch.Tensor
    starts: tuple[int, ...]


class Weights:
    """The weights of a module tree, made views of some memory and taken from it again.

    Both are short, for a request waits for them: most models come back to where they were, and find there the
    views that they had. These are kept for as long as the memory is.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._layout = layout
        modules = modules_of(model)
        self._offsets = list(accumulate(layout.segments, initial=0))  # of each segment's first byte
        self._slots = [_slots(modules, place) for place in layout.places]
        away = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in layout.places]
        self._away = [_wrapped(tensor) for tensor in away]
        self._cuts = WeakTensorKeyDictionary()  # the last _Cut of each memory

    def bind(self, at: Location) -> None:
        """Make every weight a view of this memory, always the same one for the same place."""
        cut: _Cut | None = self._cuts.get(at.memory)
        if cut is None or cut.starts != at.starts:
            cut = _Cut(at.starts, [_wrapped(view) for view in self._views(at)])
            self._cuts[at.memory] = cut
        self._put(cut.views)

    def unbind(self) -> None:
        """Put every weight back on meta: a step that must not run fails instead of reading others' bytes."""
        self._put(self._away)

    def _views(self, at: Location) -> Iterator[torch.Tensor]:
        for place in self._layout.places:
            begin = at.starts[place.segment] + place.at - self._offsets[place.segment]
            yield at.memory[begin : begin + place.bytes_].view(place.dtype).view(place.shape)

    def _put(self, weights: list[_Wrapped]) -> None:
        for slots, wrapped in zip(self._slots, weights, strict=True):
            for slot in slots:
                slot.of[slot.leaf] = wrapped.parameter if slot.is_parameter else wrapped.tensor


class _Cut(NamedTuple):
    """All weights as views of one memory."""

    starts: tuple[int, ...]
    views: list[_Wrapped]


class _Slot(NamedTuple):
    """Where a module keeps a tensor: its parameters or its buffers, and the name there."""

    of: dict[str, Any]
    leaf: str
    is_parameter: bool


class _Wrapped(NamedTuple):
    """A tensor as modules keep it."""

    tensor: torch.Tensor
    parameter: nn.Parameter


def _wrapped(tensor: torch.Tensor) -> _Wrapped:
    return _Wrapped(tensor, nn.Parameter(tensor, requires_grad=False))


def _slots(modules: dict[str, nn.Module], place: Place) -> list[_Slot]:
    found = []
    for name in place.names:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        own = leaf in module._parameters
        found.append(_Slot(module._parameters if own else module._buffers, leaf, own))
    return found

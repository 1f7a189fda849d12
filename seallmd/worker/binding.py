"""The weights of a module tree in an arena.

Owns which tensors the modules hold: views of the arena, or none. Must not know how weights came there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from seallmd.core.messages import Extent
from seallmd.worker.layout import Layout, Place, modules_of


class Weights:
    """The weights of a module tree, made views of an arena and taken from it again.

    Both are short, for a request waits for them: most models come back to where they were, and find there the
    views that they had.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._layout = layout
        modules = modules_of(model)
        self._slots = [_slots(modules, place) for place in layout.places]
        away = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in layout.places]
        self._away = [_wrapped(tensor) for tensor in away]
        self._starts: tuple[int, ...] = ()
        self._views: list[_Wrapped] = []

    def bind(self, extents: tuple[Extent, ...], arena: torch.Tensor) -> None:
        """Make every weight a view of `arena`, always the same one, where `extents` put its segment."""
        starts = tuple(extent.arena_at for extent in extents)
        if starts != self._starts:
            self._starts, self._views = starts, [_wrapped(view) for view in self._cut(extents, arena)]
        self._put(self._views)

    def unbind(self) -> None:
        """Put every weight back on meta: a step that must not run fails instead of reading others' bytes."""
        self._put(self._away)

    def _cut(self, extents: tuple[Extent, ...], arena: torch.Tensor) -> Iterator[torch.Tensor]:
        part_at = extents[0].image_at  # a rank's part of the image begins anywhere, with its first segment
        for place in self._layout.places:
            extent = extents[place.segment]
            at = extent.arena_at + place.at - (extent.image_at - part_at)
            yield arena[at : at + place.bytes_].view(place.dtype).view(place.shape)

    def _put(self, weights: list[_Wrapped]) -> None:
        for slots, wrapped in zip(self._slots, weights, strict=True):
            for slot in slots:
                slot.of[slot.leaf] = wrapped.parameter if slot.is_parameter else wrapped.tensor


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

"""Where every weight lies in the host image.

Owns the order and alignment of weights. It follows from the module tree alone, so host and workers agree
without talking. Must not know files, devices or arenas.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from seallmd.worker.parallel import divide, sit
from seallmd.worker.quantised import InBlocks, quantise

ALIGN_BYTES = 256
# Remaining tensors from here on are a segment each, so that no run of blocks need be longer than one layer.
_OWN_SEGMENT_BYTES = 8 << 20


class Place(NamedTuple):
    """One tensor. names: every name it has in the model (several when tied). at: its byte in the image."""

    names: tuple[str, ...]
    at: int
    bytes_: int
    shape: torch.Size
    dtype: torch.dtype
    segment: int


@dataclass(frozen=True)
class Layout:
    """places: in image order. segments: bytes of each; segment i starts where i - 1 ends."""

    places: tuple[Place, ...]
    segments: tuple[int, ...]

    @property
    def bytes_(self) -> int:
        """Size of the image."""
        return sum(self.segments)


def layout_of(model: nn.Module) -> Layout:
    """Parameters and persistent buffers of `model`, tied ones once, every one at a multiple of 256 bytes.

    Segments: one per decoder layer, one per large tensor outside (and its scales), one for all small ones.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    layers, modules = _layers_prefix(model), modules_of(model)
    groups: dict[str, list[int]] = {}
    for key in tensors:
        name = _leading(names[key][0], modules)
        leading = model.get_parameter(name) if name != names[key][0] else tensors[key]
        groups.setdefault(_segment_of(name, _bytes(leading), layers), []).append(key)

    places, segments, at = [], [], 0
    for index, keys in enumerate(groups.values()):
        start = at
        for key in keys:
            tensor = tensors[key]
            size = _bytes(tensor)
            places.append(Place(tuple(names[key]), at, size, tensor.shape, tensor.dtype, index))
            at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
        segments.append(at - start)
    return Layout(tuple(places), tuple(segments))


def layout_of_rank(model: PreTrainedModel, ranks: int, in_blocks: bool = False) -> Layout:
    """Layout of what one of `ranks` tensor-parallel ranks holds of `model`, a whole one on meta; the same for
    each of them. in_blocks: whether it is then quantised. Raises Indivisible."""
    tree = copy.deepcopy(model)
    if ranks > 1:
        sit(tree, divide(tree, 0, ranks))
    if in_blocks:
        quantise(tree)
    return layout_of(tree)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name, shared ones under each: to look each up by its path takes long."""
    return dict(model.named_modules(remove_duplicate=False))


def _leading(name: str, modules: dict[str, nn.Module]) -> str:
    """The weight that a scale belongs to; any other tensor is on its own."""
    path, _, leaf = name.rpartition(".")
    scaled = leaf == "scale" and isinstance(modules[path], InBlocks)
    return f"{path}.weight" if scaled else name


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _layers_prefix(model: nn.Module) -> str:
    """Name of the decoder layers' module list: the one with most weights, the outermost on a tie."""
    sizes = {
        f"{name}.": sum(_bytes(p) for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return max(sizes, key=lambda name: (sizes[name], -len(name)), default="")


def _segment_of(name: str, bytes_: int, layers: str) -> str:
    if layers and name.startswith(layers):
        return layers + name[len(layers) :].partition(".")[0]
    return name if bytes_ >= _OWN_SEGMENT_BYTES else "small tensors"

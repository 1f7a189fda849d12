"""Weights of 8 bits in blocks: `dtype = "int8"`.

Owns the scheme, which is llama.cpp's Q8_0 in another order, and the modules that hold such weights. 32
neighbours along k share a float16 scale; a weight is a whole number of -127 to 127 times that. It is stored
as that number + 128, in panels of 16 rows: of each block the first four weights of every row of the panel,
then the next four (`ops/cpp/blocks.h` says what for). Rows and columns are filled up with zeros to whole
panels and blocks. So a matrix [n, k] is

    weight  uint8    [panels, blocks, 8, 16, 4]
    scale   float16  [panels, blocks, 16]

Linear layers and embeddings are quantised; norms, biases, layers of fewer rows than a panel and whatever is
no plain linear layer (experts in one tensor, convolutions) keep their 16 bits. Must not know files, arenas
or what computes fast.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

NAME = "int8"  # the `dtype` of such a service
SCHEME = "int8 1"  # to be changed when the same weights come to give other bytes
REST_DTYPE = torch.bfloat16  # of KV, and of what is not quantised
BLOCK, PANEL = 32, 16
WEIGHT_BYTES = 1 + 2 / BLOCK  # of one weight, its share of the scale included
WEIGHT_DTYPE, SCALE_DTYPE = torch.uint8, torch.float16
_LEVELS, _OFFSET = 127, 128
_CHUNK = 1 << 22  # weights that are widened at a time


class Blocks(NamedTuple):
    """A quantised matrix [n, k]."""

    weight: torch.Tensor
    scale: torch.Tensor
    n: int
    k: int

    @classmethod
    def empty(cls, n: int, k: int, device: torch.device | str = "cpu") -> Blocks:
        """Room for one."""
        panels, blocks = -(-n // PANEL), -(-k // BLOCK)
        weight = torch.empty(panels, blocks, BLOCK // 4, PANEL, 4, dtype=WEIGHT_DTYPE, device=device)
        return cls(weight, torch.empty(panels, blocks, PANEL, dtype=SCALE_DTYPE, device=device), n, k)

    def fill(self, whole: torch.Tensor) -> None:
        """Quantise `whole` [n, k], of any float dtype, into it."""
        step = max(PANEL, _CHUNK // self.k // PANEL * PANEL)
        for at in range(0, self.n, step):
            part = whole[at : at + step].float()
            panels = slice(at // PANEL, at // PANEL - -part.shape[0] // PANEL)
            _quantise(part, self.weight[panels], self.scale[panels])

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows [ids, k] of the matrix."""
        panel, lane = ids // PANEL, ids % PANEL
        return self._widened(self.weight[panel, :, :, lane], self.scale[panel, :, lane], dtype)

    def wide(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows `first`, the first of a panel, to `end`, or the last one."""
        panels = slice(first // PANEL, -(-end // PANEL))
        weight = self.weight[panels].permute(0, 3, 1, 2, 4).flatten(0, 1)
        scale = self.scale[panels].transpose(1, 2).flatten(0, 1)
        return self._widened(weight, scale, dtype)[: min(end, self.n) - first]

    def _widened(self, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """weight [rows, blocks, 8, 4] and scale [rows, blocks] -> [rows, k]; exact but for the dtype."""
        numbers = (weight.flatten(2).float() - _OFFSET) * scale[..., None].float()
        return numbers.flatten(1)[:, : self.k].to(dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., k] times the matrix, in the dtype of x: the reference of every kernel."""
        step = max(PANEL, _CHUNK // self.k // PANEL * PANEL)
        parts = [functional.linear(x, self.wide(at, at + step, x.dtype)) for at in range(0, self.n, step)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias.to(x.dtype)


def _quantise(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """rows [n, k] float32 into whole panels."""
    n, k = rows.shape
    panels, blocks = weight.shape[:2]
    rows = functional.pad(rows, (0, blocks * BLOCK - k, 0, panels * PANEL - n))
    parts = rows.view(panels, PANEL, blocks, BLOCK // 4, 4)
    steps = (parts.abs().amax((-1, -2)) / _LEVELS).to(SCALE_DTYPE)  # [panels, 16, blocks]
    # By the scale as it is stored: what rounding it cost is then made good by the numbers.
    per_step = torch.where(steps == 0, 0.0, 1 / steps.float())
    numbers = (parts * per_step[..., None, None]).round_().clamp_(-_LEVELS, _LEVELS).add_(_OFFSET)
    weight.copy_(numbers.permute(0, 2, 3, 1, 4))
    scale.copy_(steps.transpose(1, 2))


# --------------------------------------------------------------------------------------------- modules


class InBlocks(nn.Module):
    """A module whose `weight` and `scale` are those of `Blocks`.

    rows, columns: of the matrix, of a rank's part where there are ranks.
    """

    rows: int
    columns: int

    @property
    def blocks(self) -> Blocks:
        """The matrix that is bound now."""
        weight, scale = self._parameters["weight"], self._parameters["scale"]
        assert weight is not None
        assert scale is not None
        return Blocks(weight, scale, self.rows, self.columns)


class QuantisedLinear(InBlocks, nn.Linear):
    """A linear layer; it computes in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]."""
        return self.blocks.linear(x, self.bias)


class QuantisedEmbedding(InBlocks, nn.Embedding):
    """An embedding, whatever its class did with the rows.

    Only the rows that are asked for are widened: the class runs on a table of these alone.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids -> [..., dim] in the dtype of the weights that were not quantised."""
        return looked_up(self.__dict__["shadow"], self.blocks.rows(ids.flatten(), REST_DTYPE), ids)


def shadow_of(embedding: nn.Embedding) -> nn.Embedding:
    """One of the same class whose table is to be given to `looked_up`."""
    shadow = copy.copy(embedding)
    shadow._parameters = dict(embedding._parameters)
    shadow.padding_idx = None  # of use in training alone, and outside a small table
    return shadow


def looked_up(shadow: nn.Embedding, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What the class of `shadow` makes of `rows`, those of all `ids` in turn."""
    shadow._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    out: torch.Tensor = type(shadow).forward(shadow, numbers)
    return out


def is_linear(module: object) -> bool:
    """Whether it is a plain linear layer, of whatever weights."""
    return type(module) in (nn.Linear, QuantisedLinear)


def shape_of(linear: Any) -> tuple[int, int]:
    """(n, k) of a plain linear layer."""
    if isinstance(linear, QuantisedLinear):
        return linear.rows, linear.columns
    n, k = linear.weight.shape
    return n, k


def quantise(model: nn.Module) -> None:
    """Have weights of `model`, which are on meta, in blocks from here on: each matrix of `REST_DTYPE` that
    belongs to plain linear layers and embeddings alone.

    Ties stay ties. A part of a tensor-parallel rank is quantised as a matrix of its own.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(module)
    for whole, modules in owners.items():
        large = whole.dtype is REST_DTYPE and whole.ndim == 2 and whole.shape[0] >= PANEL
        if large and all(_takes(module, whole) for module in modules):
            blocks = Blocks.empty(whole.shape[0], whole.shape[1], device="meta")
            weight, scale = (nn.Parameter(t, requires_grad=False) for t in blocks[:2])
            for module in modules:
                _convert(module, weight, scale, whole)


def _takes(module: nn.Module, whole: nn.Parameter) -> bool:
    plain = type(module) is nn.Linear or isinstance(module, nn.Embedding)
    return plain and module._parameters["weight"] is whole


def _convert(module: Any, weight: nn.Parameter, scale: nn.Parameter, whole: nn.Parameter) -> None:
    """In place: whoever holds the module, ties and the hooks of tensor parallelism stay as they are."""
    if type(module) is nn.Linear:
        module.__class__ = QuantisedLinear
    else:
        module.__dict__["shadow"] = shadow_of(module)  # not a part of the tree
        module.__class__ = QuantisedEmbedding
    module.rows, module.columns = whole.shape
    module._parameters["weight"], module._parameters["scale"] = weight, scale

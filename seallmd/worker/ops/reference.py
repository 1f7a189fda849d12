"""What each operation means, in plain torch: the oracle of the tests and of every recognised module.

Must not know modules or the arena. Attention's reference is `paged.PagedBatch` itself, without `native`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Norm(NamedTuple):
    """What an RMSNorm needs besides its input: weight [n]; offset 1 is Gemma's."""

    weight: torch.Tensor
    eps: float
    offset: float


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] float32, weight [n, k] and bias [n] of any float dtype: products and sums in float32."""
    return functional.linear(x, weight.float(), None if bias is None else bias.float())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension; offset 1 is Gemma's."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.float())


def add_norm(
    x: torch.Tensor, y: torch.Tensor, before: Norm, after: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of half a layer and the beginning of the next: x + y, and that through the norm `before`.

    after: a norm that y goes through first (Gemma's, behind attention and MLP).
    """
    total = x + (y if after is None else norm(y, *after))
    return total, norm(total, *before)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """A gated linear unit's product (Shazeer 2020)."""
    return ACTIVATIONS[activation](gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) in halves. x [tokens, heads, dim], cos and sin [tokens, width]."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
    return torch.cat((turned, rest), -1)


def rotate_normed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, before: Norm | None) -> torch.Tensor:
    """`rotate` of x [tokens, heads, dim], each head of which goes through a norm first where there is one."""
    return rotate(x if before is None else norm(x, *before), cos, sin)

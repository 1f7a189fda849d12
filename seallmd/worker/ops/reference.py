"""What each operation means, in plain torch: the oracle of the tests and of every recognised module.

Must not know modules or the arena. Attention's reference is `paged.PagedBatch` itself, without `native`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., k] float32, weight [n, k] and bias [n] of any float dtype: products and sums in float32."""
    return functional.linear(x, weight.float(), None if bias is None else bias.float())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension; offset 1 is Gemma's."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.float())


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

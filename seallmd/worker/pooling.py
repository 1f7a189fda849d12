"""Hidden states of prompts, pooled: what embeddings are made of.

Owns summing them up; whoever has all parts of a prompt divides by its length. Must not know requests, the
model or the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seallmd.core.messages import Pooled


class PoolPart(NamedTuple):
    """Neighbouring tokens of one request. position: of the first among the request's tokens.

    at: packed index of the first; the others follow.
    """

    request: int
    position: int
    tokens: int
    at: int


def pool(hidden: torch.Tensor, parts: Sequence[PoolPart]) -> tuple[Pooled, ...]:
    """The sum of each part's hidden states, in float32. hidden: [packed tokens, hidden size]."""
    if not parts:
        return ()
    sums = torch.stack([hidden[part.at : part.at + part.tokens].float().sum(0) for part in parts])
    rows = sums.cpu().numpy().astype("<f4")  # one wait for the device
    return tuple(
        Pooled(part.request, part.position, part.tokens, row.tobytes())
        for part, row in zip(parts, rows, strict=True)
    )

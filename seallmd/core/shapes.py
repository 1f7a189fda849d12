"""What is known of a model without reading its weights.

Owns these structs, which the host process fills in (`worker/probe.py`). Must not know torch or policy.
"""

from __future__ import annotations

import msgspec


class LayerShape(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """KV of one attention layer on one rank. k_dim and v_dim are elements per head."""

    kv_heads: int
    k_dim: int
    v_dim: int


class Shard(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one of `ranks` tensor-parallel ranks holds; the same for each of them.

    layers: KV of each attention layer on one rank. segments: bytes of each weights segment of one rank.
    """

    ranks: int
    layers: tuple[LayerShape, ...]
    segments: tuple[int, ...]


class ModelShape(msgspec.Struct, frozen=True, gc=False):
    """What the probe learnt of a model.

    dtype: "float32", "float16" or "bfloat16", of weights and KV; "int8" of weights in blocks, with KV of
    bfloat16. itemsize: bytes per element of KV. weight_itemsize: per weight, 0 where that is the same.
    segments: bytes of each weights segment, in image order; only a segment must be contiguous in an arena.
    layers: one entry per attention layer. vocab: rows of the output layer. context: the limit in tokens
    that the service runs with. eos: token ids that end a generation. shards: how it can be split over
    several devices by tensor parallelism, fewest ranks first; `layers` and `segments` are those of one rank.
    hidden: elements of a hidden state behind the last layer.
    """

    architecture: str
    dtype: str
    itemsize: int
    layers: tuple[LayerShape, ...]
    segments: tuple[int, ...]
    vocab: int
    context: int
    eos: tuple[int, ...] = ()
    shards: tuple[Shard, ...] = ()
    hidden: int = 0
    weight_itemsize: float = 0.0

    def shard(self, ranks: int) -> Shard:
        """What one of so many ranks holds. Raises ValueError when the model cannot be split so."""
        if ranks == 1:
            return Shard(1, self.layers, self.segments)
        for shard in self.shards:
            if shard.ranks == ranks:
                return shard
        feasible = " or ".join(str(shard.ranks) for shard in self.shards)
        instead = f"only over {feasible}" if feasible else "it has to be on one"
        raise ValueError(f"{self.architecture} cannot be split over {ranks} devices: {instead}")

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return self.itemsize * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in self.layers)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(self.segments)

    @property
    def bytes_per_weight(self) -> float:
        """Not a whole number where blocks of weights have scales."""
        return self.weight_itemsize or self.itemsize

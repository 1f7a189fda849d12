"""Over how many devices a service is split where nobody has said so.

Owns this judgement alone. Every model is split over as few devices as hold it (tensor parallelism), and,
where there are devices enough, further while that is not wasteful: on more devices each step is shorter, but
takes more of their time together, because fixed costs and sums over ranks do not get less. A lone request's
decode step is what is looked at, by the device's roofline: the choice is made when a service first comes in,
before any step has taught better, and stands while it is resident.
"""

from __future__ import annotations

from seallmd.core.cost import Roofline, Work
from seallmd.core.shapes import ModelShape


def worthwhile_ranks(shape: ModelShape, roofline: Roofline, fewest: int, efficiency: float) -> list[int]:
    """Numbers of ranks above `fewest` that are worth their devices, the most first.

    efficiency: the least share of the devices' time that must go as far as it does on the fewest.
    """

    def device_seconds(ranks: int) -> float:
        return ranks * roofline.step(Work.of(shape, ranks), 1, 0, 1)

    limit = device_seconds(fewest) / efficiency
    more = [shard.ranks for shard in shape.shards if shard.ranks > fewest]
    return sorted((ranks for ranks in more if device_seconds(ranks) <= limit), reverse=True)

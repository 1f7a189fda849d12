"""Which replicas should exist where, and what is asked of them: the structs that planning works on.

Owns the words of planning and what can be read off them without a model of time. Must not predict latencies
(`core.latency`), search (`core.placement`) or decide when to act (`core.replacement`), and knows nothing of a
running node: whoever has one fills these structs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from seallmd.core.cost import StepCosts

Devices = tuple[int, ...]  # the group of one replica; the order is that of the tensor-parallel ranks

GROUP_SIZES = (1, 2, 4, 8)  # of tensor-parallel groups, as in SeaLLM


class Split(msgspec.Struct, frozen=True):
    """A service on `ranks` devices: what one rank holds, and how long a step of all of them takes.

    weights_bytes: of one rank. kv_bytes_per_token: of one rank, over all layers. A step takes fixed_seconds +
    token_seconds for each row that decodes + prompt_seconds for each token of a prompt + context_seconds for
    each token of KV that its rows read.
    """

    ranks: int
    weights_bytes: int
    kv_bytes_per_token: float
    fixed_seconds: float
    token_seconds: float
    context_seconds: float
    prompt_seconds: float

    @classmethod
    def of(cls, ranks: int, weights_bytes: int, kv_bytes_per_token: float, costs: StepCosts) -> Split:
        """With the step times that were learnt (or guessed) for so many ranks."""
        fixed = costs.predict(0, 0)
        many = 1e6  # prediction is linear: the slope over many tokens is that of one
        token = (costs.predict(many, 0) - fixed) / many
        context = (costs.predict(0, many) - fixed) / many
        prompt = (costs.predict(many, 0, rows=0) - fixed) / many
        return cls(ranks, weights_bytes, kv_bytes_per_token, fixed, token, context, prompt)


class Demand(msgspec.Struct, frozen=True):
    """What is asked of one service.

    rate: requests per second. importance: what a second of one of them counts for. prompt_tokens,
    output_tokens: means of a request. splits: the numbers of ranks that it can run on, fewest first; at
    least one. least_tokens: KV of so many tokens must fit beside the weights, or the service cannot run
    there (a longest request). placed: the groups that the operator wants it on, () for nowhere; None leaves
    it to the planner.
    """

    name: str
    rate: float
    prompt_tokens: float
    output_tokens: float
    splits: tuple[Split, ...]
    least_tokens: int = 256
    placed: tuple[Devices, ...] | None = None
    importance: float = 1.0

    def split(self, ranks: int) -> Split | None:
        """How it runs on so many ranks; None when it cannot."""
        return next((split for split in self.splits if split.ranks == ranks), None)

    def least_bytes(self, split: Split) -> float:
        """What a device must have for one rank: weights and the least KV."""
        return split.weights_bytes + self.least_tokens * split.kv_bytes_per_token

    def output(self) -> float:
        """Mean output in tokens, for dividing by: a request has at least one."""
        return max(1.0, self.output_tokens)


class Machine(msgspec.Struct, frozen=True):
    """What there is to place on.

    arena_bytes: of each device. copy_bytes_per_second: from the host to one device, measured. swap_seconds:
    what a swap takes beside its copy. max_rows: requests in one step. sizes: of groups that may be formed, in
    ascending order, 1 among them, each a multiple of the one before. apart: pairs of services, each in both
    orders, that may not be resident on one device.
    """

    arena_bytes: tuple[int, ...]
    copy_bytes_per_second: float
    swap_seconds: float = 0.2
    max_rows: int = 64
    sizes: tuple[int, ...] = GROUP_SIZES
    apart: tuple[tuple[str, str], ...] = ()

    def swap(self, split: Split) -> float:
        """Seconds until a service is resident: its ranks are copied side by side."""
        return self.swap_seconds + split.weights_bytes / self.copy_bytes_per_second


class Plan(msgspec.Struct, frozen=True):
    """The groups of every service's replicas. A service with none is absent: swapped in when it is asked for.

    A device is in at most one group of a service. Groups of different services may overlap in any way.
    """

    replicas: dict[str, tuple[Devices, ...]]

    def of(self, service: str) -> tuple[Devices, ...]:
        """The groups of a service, () when it is absent or unknown."""
        return self.replicas.get(service, ())

    def placed(self) -> Iterator[tuple[str, Devices]]:
        """Every replica: its service and its group."""
        for service, groups in self.replicas.items():
            for group in groups:
                yield service, group

    def same(self, other: Plan) -> bool:
        """Whether both have the same replicas, in whatever order they are listed."""
        return set(self.placed()) == set(other.placed())


def meet(some: Iterable[Devices], others: Iterable[Devices]) -> bool:
    """Whether two services' groups have a device in common."""
    return not {device for group in some for device in group}.isdisjoint(
        device for group in others for device in group
    )


def groups_of(machine: Machine, ranks: int) -> list[Devices]:
    """The groups of so many devices that are considered: disjoint, each of devices as equal as can be.

    Devices in descending order of memory, cut into runs: as runs of 1, 2, 4 and 8 are parts of one another,
    any choice of disjoint ones is a partition, and every multiset of sizes is among them.
    """
    arenas = machine.arena_bytes
    order = sorted(range(len(arenas)), key=lambda device: (-arenas[device], device))
    runs = (order[at : at + ranks] for at in range(0, len(order) - ranks + 1, ranks))
    return [tuple(sorted(run)) for run in runs]


def broken(plan: Plan, demands: Sequence[Demand], machine: Machine) -> str:
    """Why the plan cannot exist on the machine, in one line; empty when it can.

    A device must hold the weights of all its replicas and beside them the least KV of each one alone.
    """
    known = {demand.name: demand for demand in demands}
    weights = [0.0] * len(machine.arena_bytes)
    least = [0.0] * len(machine.arena_bytes)
    for service, groups in plan.replicas.items():
        devices = [device for group in groups for device in group]
        if len(set(devices)) < len(devices):
            return f"{service} is twice on one device"
        if any(not 0 <= device < len(weights) for device in devices):
            return f"{service} is on a device that there is not"
        for group in groups:
            split = known[service].split(len(group)) if service in known else None
            if split is None:
                return f"{service} cannot run on {len(group)} devices"
            for device in group:
                weights[device] += split.weights_bytes
                least[device] = max(least[device], known[service].least_bytes(split) - split.weights_bytes)
    for one, other in machine.apart:
        if meet(plan.of(one), plan.of(other)):
            return f"{one} and {other} may not be on one device"
    for device, arena in enumerate(machine.arena_bytes):
        if weights[device] + least[device] > arena:
            return f"device {device} has {arena} bytes, {weights[device] + least[device]:.0f} are needed"
    return ""


def by_name(demands: Sequence[Demand]) -> Mapping[str, Demand]:
    """The demands by service. Raises ValueError when a service is there twice."""
    found = {demand.name: demand for demand in demands}
    if len(found) < len(demands):
        raise ValueError("a service is in the demands twice")
    return found

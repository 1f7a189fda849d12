"""Which plan to have: SeaLLM's placement in two stages, and a local search behind them.

Owns the search. Predictions come from `core.latency`; when a plan is worth moving to is `core.replacement`'s.

Stage 1 cuts the devices into *cells*, stage 2 gives every service a spot: cells where it has replicas, or one
that it visits while it is absent. Services go in descending rate * work (and once more in descending
weights), each to where the rate-weighted normalized latency grows least; replicas are added while they pay;
then services move, swap, and gain or lose replicas until nothing helps. The steps of SeaLLM's stages are
reconstructed (the paper names the two stages).

All replicas of a cell span it whole, so that cells do not touch each other and the objective is a sum over
cells, each remembered by its contents. Two limits keep this fast: cells are aligned runs of devices sorted by
memory, so that of equal devices only the number in each cell counts; and partitions are not all tried (32
devices have 165 multisets of sizes): from the even ones, cells are cut and joined while it helps. Replicas
that the operator placed need not fit the cells: each counts in every cell that it touches. On small machines,
where whole plans are predicted quickly, single services may leave the cells in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isinf
from typing import NamedTuple

from seallmd.core.latency import NOWHERE_SECONDS, Load, Work, estimate, solve
from seallmd.core.plan import Demand, Devices, Machine, Plan, broken, by_name, groups_of

_LEAST_GAIN = 1e-3  # of the objective if nobody had neighbours: what gains less is not worth a replica
_POLISHED = 3  # partitions that get the whole local search
_EFFORT = 1200  # cells predicted in one local search, at most
_FINISH = 6000  # devices * services * whole plans predicted after the search in cells, at most


class Spot(NamedTuple):
    """Where a service is: in cells (by index), as a resident or visiting (then in one). () is nowhere."""

    cells: tuple[int, ...]
    visiting: bool = False


NOWHERE = Spot(())


class _Guest(NamedTuple):
    """A service in a cell. replicas: that it has in all. touched: cells that this one spans."""

    service: int
    ranks: int
    replicas: int
    visiting: bool
    touched: int = 1


class _Cell(NamedTuple):
    """A group of devices, and what the operator placed on some of them. arena: bytes of its smallest."""

    devices: Devices
    arena: int
    placed: frozenset[_Guest]


class _Predictor:
    """The objective's share of a cell by its contents; remembers what it was asked. tries: not remembered.

    Contents are sets of guests as bits of an integer: the search takes guests out and in far more often than
    it meets contents that are new.
    """

    def __init__(self, demands: Sequence[Demand], machine: Machine) -> None:
        self.works = {
            (i, split.ranks): Work.of(demand, split, machine)
            for i, demand in enumerate(demands)
            for split in demand.splits
        }
        self.tries = 0
        self._max_rows = machine.max_rows
        of: dict[int, list[Work]] = {}
        for (service, _), work in self.works.items():
            of.setdefault(service, []).append(work)
        # What a second of a service's requests counts; weighted seconds of one that has a group to itself.
        self.weight = {service: works[0].weight for service, works in of.items()}
        self.alone = {service: min(w.weight * w.alone() for w in works) for service, works in of.items()}
        number = {demand.name: i for i, demand in enumerate(demands)}
        pairs = ((number.get(one), number.get(other)) for one, other in machine.apart)
        self._apart = {pair for pair in pairs if None not in pair}
        self._known: dict[tuple[int, int], float] = {}
        self._bits: dict[tuple[int, int, int, bool, int], int] = {}  # keys are guests
        self._guests: list[_Guest] = []  # of each bit

    def bit(self, service: int, ranks: int, replicas: int, visiting: bool, touched: int = 1) -> int:
        """A guest as contents."""
        key = service, ranks, replicas, visiting, touched
        if (known := self._bits.get(key)) is None:
            known = self._bits[key] = 1 << len(self._guests)
            self._guests.append(_Guest(*key))
        return known

    def cost(self, arena: int, contents: int) -> float:
        """Weighted seconds of the guests; inf when their weights do not fit."""
        key = arena, contents
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._solve(arena, self._listed(contents))
        return known

    def _listed(self, contents: int) -> list[_Guest]:
        """The guests of some contents, in order: sums of floats depend on it."""
        found = []
        while contents:
            lowest = contents & -contents
            found.append(self._guests[lowest.bit_length() - 1])
            contents ^= lowest
        return sorted(found)

    def _solve(self, arena: int, inside: list[_Guest]) -> float:
        self.tries += 1
        loads = [
            Load(self.works[service, ranks], 1 / replicas, (0,), visiting)
            for service, ranks, replicas, visiting, _ in inside
        ]
        residents = [guest.service for guest in inside if not guest.visiting]
        if self._apart and any((one, other) in self._apart for one in residents for other in residents):
            return float("inf")
        weights = spare = 0.0
        for work, _, _, visiting in loads:
            if not visiting:
                weights, spare = weights + work.weights_bytes, max(spare, work.spare_bytes)
            elif work.weights_bytes + work.spare_bytes > arena:
                return float("inf")
        if weights + spare > arena:
            return float("inf")
        outcomes = solve(loads, (arena,), self._max_rows)
        return sum(
            load.work.weight * load.share / guest.touched * outcome.seconds
            for load, guest, outcome in zip(loads, inside, outcomes, strict=True)
        )


_Choices = Callable[["_Layout", int], Iterator[dict[int, Spot]]]  # changes of one kind for a service


class _Layout:
    """One partition, and the spot of every service in it; searches by changing spots."""

    def __init__(
        self, cells: Sequence[_Cell], order: Sequence[int], visit_only: set[int], predictor: _Predictor
    ) -> None:
        """order: the services that may be moved, heaviest first. visit_only: those that must be absent."""
        self.cells = cells
        self._predictor = predictor
        self._order = order
        self._visit_only = visit_only
        self.spots = dict.fromkeys(order, NOWHERE)
        self._sizes = [len(cell.devices) for cell in cells]
        self._arenas = [cell.arena for cell in cells]
        self._contents = [sum(predictor.bit(*guest) for guest in cell.placed) for cell in cells]
        self._costs = [predictor.cost(*cell) for cell in zip(self._arenas, self._contents, strict=True)]
        self._lost = {s: predictor.weight[s] * NOWHERE_SECONDS for s in order}
        self._least = _LEAST_GAIN * sum([predictor.alone[s] for s in order])
        self.objective = sum(self._costs) + sum(self._lost.values())
        self._changes = 0
        self._vain: dict[tuple[_Choices, int], int] = {}  # when a service's choices last gained too little

    # ----------------------------------------------------------------------------- changing spots

    def _after(self, changes: dict[int, Spot]) -> dict[int, int]:
        """Contents of the cells that the changes touch."""
        found: dict[int, int] = {}
        bit, sizes, contents = self._predictor.bit, self._sizes, self._contents
        for service, after in changes.items():
            for cells, visiting in (self.spots[service], after):  # out where it was, in where it goes
                replicas, size, guest = len(cells), 0, 0
                for cell in cells:
                    if sizes[cell] != size:  # most have all their cells of one size
                        size = sizes[cell]
                        guest = bit(service, size, replicas, visiting)
                    found[cell] = (found[cell] if cell in found else contents[cell]) ^ guest
        return found

    def gain(self, changes: dict[int, Spot]) -> float:
        """By how much the objective would fall; -inf when something does not fit."""
        cost, costs, arenas = self._predictor.cost, self._costs, self._arenas
        gain = 0.0
        for cell, inside in self._after(changes).items():
            gain += costs[cell] - cost(arenas[cell], inside)
        for service, spot in changes.items():
            gain += self._lost[service] * ((not self.spots[service].cells) - (not spot.cells))
        return gain

    def change(self, changes: dict[int, Spot]) -> None:
        """Make the changes."""
        self.objective -= self.gain(changes)
        for cell, inside in self._after(changes).items():
            self._contents[cell] = inside
            self._costs[cell] = self._predictor.cost(self._arenas[cell], inside)
        self.spots.update(changes)
        self._changes += 1

    def _take_best(self, choices: _Choices, service: int, least: float) -> bool:
        """Make the best of a service's changes of a kind if it gains more than `least`.

        What has gained too little is not tried again before anything has changed; `least` never falls.
        """
        if self._vain.get((choices, service)) == self._changes:
            return False
        best, most = None, least
        for changes in choices(self, service):
            if (gain := self.gain(changes)) > most:
                best, most = changes, gain
        if best is None:
            self._vain[choices, service] = self._changes
            return False
        self.change(best)
        return True

    # -------------------------------------------------------------------------------- which changes

    def _hosts(self, service: int) -> list[int]:
        """Cells of a size that the service can run on; of those with equal contents the first."""
        works, kinds = self._predictor.works, dict[tuple[int, int, int], int]()
        for cell, kind in enumerate(zip(self._sizes, self._arenas, self._contents, strict=True)):
            if (service, kind[0]) in works:
                kinds.setdefault(kind, cell)
        return list(kinds.values())

    def _alone(self, service: int) -> Iterator[dict[int, Spot]]:
        """The service in one other cell, or visiting one."""
        for cell in self._hosts(service):
            if service not in self._visit_only:
                yield {service: Spot((cell,))}
            yield {service: Spot((cell,), visiting=True)}

    def _replicas(self, service: int) -> Iterator[dict[int, Spot]]:
        """One replica more, one less, or one elsewhere."""
        cells, visiting = self.spots[service]
        if not cells or visiting or service in self._visit_only:
            return
        others = [cell for cell in self._hosts(service) if cell not in cells]
        for cell in others:
            yield {service: Spot(tuple(sorted((*cells, cell))))}
        if len(cells) > 1:
            alike = {(self._sizes[c], self._arenas[c], self._contents[c]): c for c in reversed(cells)}
            for gone in alike.values():
                rest = tuple(cell for cell in cells if cell != gone)
                yield {service: Spot(rest)}
                for cell in others:
                    yield {service: Spot(tuple(sorted((*rest, cell))))}

    def _swaps(self, service: int) -> Iterator[dict[int, Spot]]:
        """The service and another in each other's spots."""
        mine = self.spots[service]
        for other in self._order:
            theirs = self.spots[other]
            if mine != theirs and self._may(service, theirs) and self._may(other, mine):
                yield {service: theirs, other: mine}

    def _may(self, service: int, spot: Spot) -> bool:
        works = self._predictor.works
        runs = all((service, len(self.cells[cell].devices)) in works for cell in spot.cells)
        return runs and (spot.visiting or service not in self._visit_only)

    # ------------------------------------------------------------------------------------ searching

    def fill(self) -> None:
        """Stage 2's first part: services in order to where it costs least, then replicas while they pay."""
        if isinf(self.objective):
            return  # what the operator placed does not fit the smallest device of a cell
        for service in self._order:
            self._take_best(_Layout._alone, service, 0.0)
        helped = True
        while helped:
            helped = False
            for service in self._order:
                helped |= self._take_best(_Layout._replicas, service, self._least)

    def polish(self) -> None:
        """Stage 2's second part: change one spot, or swap two, while it helps and the effort lasts."""
        start, helped = self._predictor.tries, not isinf(self.objective)
        while helped:
            helped = False
            for service in self._order:
                if self._predictor.tries - start > _EFFORT:
                    return
                for choices in (_Layout._alone, _Layout._replicas, _Layout._swaps):
                    helped |= self._take_best(choices, service, self._least)


# --------------------------------------------------------------------------------------- partitions

_Run = tuple[int, int]  # first device of a cell in the sorted order, and how many


def _evenly(devices: int, sizes: Sequence[int]) -> list[_Run]:
    """Runs of the largest size, what is left in smaller ones."""
    runs, at = [], 0
    for size in sorted(sizes, reverse=True):
        while at + size <= devices:
            runs.append((at, size))
            at += size
    return runs


def _variants(runs: list[_Run], sizes: Sequence[int]) -> Iterator[list[_Run]]:
    """Each partition that comes of cutting one run into the next smaller size, or of joining such runs."""
    smaller = dict(zip(sizes[1:], sizes, strict=False))
    for run in runs:
        at, size = run
        rest = [other for other in runs if other != run]
        if size in smaller:
            yield sorted([*rest, *((cut, smaller[size]) for cut in range(at, at + size, smaller[size]))])
        for larger, part in smaller.items():
            parts = [(cut, part) for cut in range(at, at + larger, part)]
            if size == part and at % larger == 0 and all(cut in runs for cut in parts):
                yield sorted([*(other for other in runs if other not in parts), (at, larger)])


class _Planner:
    """One search for a plan."""

    def __init__(self, demands: Sequence[Demand], machine: Machine, near: Plan | None) -> None:
        by_name(demands)
        self._demands, self._machine, self._near = demands, machine, near
        self._predictor = _Predictor(demands, machine)
        arenas = machine.arena_bytes
        falling = sorted(range(len(arenas)), key=lambda device: (-arenas[device], device))
        # The runs of one order leave over a small device where those of the other leave over a large one.
        self._orders_of_devices = [falling] if len(set(arenas)) == 1 else [falling, falling[::-1]]
        self._free = [i for i, demand in enumerate(demands) if not demand.placed]
        loads = {i: self._predictor.works[i, demands[i].splits[0].ranks].load() for i in self._free}
        self._free.sort(key=lambda i: (-loads[i], i))
        weights = {i: self._predictor.works[i, demands[i].splits[0].ranks].weights_bytes for i in self._free}
        # By work, as SeaLLM; and by weights, which fits in more where memory is what is short.
        self._orders_of_services = (self._free, sorted(self._free, key=lambda i: (-weights[i], i)))
        self._filled: dict[tuple[object, ...], _Layout] = {}
        usable = {split.ranks for i in self._free for split in demands[i].splits}
        self._sizes = [s for s in machine.sizes if s <= len(arenas) and (s in usable or s == 1)]

    def best(self) -> Plan:
        """The best plan found."""
        for order in self._orders_of_devices:
            self._descend(order)
        layouts = sorted(self._filled.values(), key=lambda layout: layout.objective)[:_POLISHED]
        for layout in layouts:
            layout.polish()
        return self._finish(min((self._plan(layout) for layout in layouts), key=self._latency))

    def _latency(self, plan: Plan) -> float:
        return estimate(plan, self._demands, self._machine).normalized_latency

    def _finish(self, plan: Plan) -> Plan:
        """Let single services leave the cells, while it helps. Only where predicting whole plans is cheap."""
        left = _FINISH // (len(self._demands) * len(self._machine.arena_bytes))
        if left <= len(self._free):
            return plan
        best, helped = self._latency(plan), True
        while helped:
            helped = False
            for i in self._free:
                for groups in self._elsewhere(plan, i):
                    other = Plan({**plan.replicas, self._demands[i].name: groups})
                    if left <= 0 or broken(other, self._demands, self._machine):
                        continue
                    left -= 1
                    if (latency := self._latency(other)) < best * (1 - _LEAST_GAIN):
                        plan, best, helped = other, latency, True
        return plan

    def _elsewhere(self, plan: Plan, service: int) -> Iterator[tuple[Devices, ...]]:
        """Other groups for one service, whatever the cells: one more, one less, one alone, all of a size."""
        demand = self._demands[service]
        if demand.placed is not None:
            return
        mine = plan.of(demand.name)
        yield from (tuple(group for group in mine if group != gone) for gone in mine)
        for split in demand.splits:
            groups = groups_of(self._machine, split.ranks)
            yield tuple(groups)
            for group in groups:
                yield (group,)
                if all(set(group).isdisjoint(other) for other in mine):
                    yield tuple(sorted((*mine, group)))

    def _descend(self, order: Sequence[int]) -> None:
        """Fill partitions into runs of the order: even ones, then variants of the best while they help."""

        def objective(runs: list[_Run]) -> float:
            return self._fill([tuple(sorted(order[at : at + size])) for at, size in runs]).objective

        starts = [_evenly(len(order), self._sizes[: i + 1]) for i in range(len(self._sizes))]
        runs = min(starts, key=objective)
        while True:
            variant = min(_variants(runs, self._sizes), key=objective, default=runs)
            if objective(variant) >= objective(runs):
                return
            runs = variant

    def _fill(self, groups: list[Devices]) -> _Layout:
        """The partition, filled; partitions that differ in the names of equal devices are filled once."""
        arenas = [min(self._machine.arena_bytes[device] for device in group) for group in groups]
        cells = [_Cell(g, arena, self._placed(g, groups)) for g, arena in zip(groups, arenas, strict=True)]
        key = tuple(sorted((len(cell.devices), cell.arena, tuple(sorted(cell.placed))) for cell in cells))
        if key not in self._filled:
            visit_only = {i for i in self._free if self._demands[i].placed is not None}
            filled = [
                _Layout(cells, order, visit_only, self._predictor) for order in self._orders_of_services
            ]
            for layout in filled:
                layout.fill()
            self._filled[key] = min(filled, key=lambda layout: layout.objective)
        return self._filled[key]

    def _placed(self, group: Devices, groups: list[Devices]) -> frozenset[_Guest]:
        """The operator's replicas that touch a group."""
        guests = set()
        for i, demand in enumerate(self._demands):
            for placed in demand.placed or ():
                if not set(placed).isdisjoint(group):
                    touched = sum(1 for g in groups if not set(placed).isdisjoint(g))
                    guests.add(_Guest(i, len(placed), len(demand.placed or ()), False, touched))
        return frozenset(guests)

    def _plan(self, layout: _Layout) -> Plan:
        devices = self._named(layout)
        replicas = {demand.name: demand.placed or () for demand in self._demands}
        for i, spot in layout.spots.items():
            if not spot.visiting:
                replicas[self._demands[i].name] = tuple(sorted(devices[cell] for cell in spot.cells))
        return Plan(replicas)

    def _named(self, layout: _Layout) -> dict[int, Devices]:
        """Which cell gets which devices: of equal cells, each those that hold most of its weights by now."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for c, cell in enumerate(layout.cells):
            alike.setdefault((len(cell.devices), cell.arena, cell.placed), []).append(c)
        found: dict[int, Devices] = {}
        for cells in alike.values():
            pairs = [
                (-self._held(layout, c, layout.cells[other].devices), c, other)
                for c in cells
                for other in cells
            ]
            taken: set[int] = set()
            for _, c, other in sorted(pairs):
                if c not in found and other not in taken:
                    found[c] = layout.cells[other].devices
                    taken.add(other)
        return found

    def _held(self, layout: _Layout, cell: int, devices: Devices) -> float:
        """Bytes of the cell's residents that lie on the devices in the plan to stay near."""
        if self._near is None:
            return 0.0
        return sum(
            self._predictor.works[i, len(devices)].weights_bytes
            for i, spot in layout.spots.items()
            if cell in spot.cells and not spot.visiting and devices in self._near.of(self._demands[i].name)
        )


def place(demands: Sequence[Demand], machine: Machine, near: Plan | None = None) -> Plan:
    """The best plan found for these demands. Deterministic.

    near: of plans that differ by a renaming of equal devices, the one with the fewest moves from this one is
    given. Demands with `placed` get just that. A service that fits nowhere beside the others is absent.
    Raises ValueError when a service is in the demands twice, or when what is placed cannot exist.
    """
    fixed = Plan({demand.name: demand.placed or () for demand in demands})
    if reason := broken(fixed, demands, machine):
        raise ValueError(f"the operator's placement cannot be: {reason}")
    if not machine.arena_bytes or not demands:
        return Plan({demand.name: () for demand in demands})
    in_order = sorted(demands, key=lambda demand: demand.name)  # theirs is not to change the plan
    return _Planner(in_order, machine, near).best()

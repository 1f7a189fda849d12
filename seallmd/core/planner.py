"""Plans of a running node: what is asked of it, where its services should be, and getting there.

Owns the way between the node's state and planning's own structs, and the steps of a plan that is being
applied, one at a time. Must not predict (`latency`), search (`placement`: an action, its result an event) or
decide when to move (`replacement`). Demand goes before plans: what is asked for now is brought in by
`residency` without waiting for a plan, and a plan that finds its way blocked is given up.
"""

from __future__ import annotations

from collections import deque
from math import inf

from seallmd.core.cost import StepCosts
from seallmd.core.events import SearchPlan
from seallmd.core.images import Images
from seallmd.core.places import Places, available
from seallmd.core.plan import Demand, Devices, Machine, Plan, Split, broken
from seallmd.core.replacement import Replacement
from seallmd.core.residency import Residency
from seallmd.core.room import Room
from seallmd.core.service import Image, Replica, Service, Stage
from seallmd.core.state import Device, NodeState
from seallmd.core.status import PlanStatus
from seallmd.core.transition import Bring, Change

TICK_SECONDS = 5.0  # between two looks at the regret
KV_GROWTH = 0.5  # of the KV in use on a device: so much stays free beside a replica that a plan brings in
IDLE_RATE = 1e-3  # requests per second: below it, an absent service is left alone
STEP_SECONDS = 30.0  # that a step may take before the plan is given up


class Planner:
    """Has plans made and carries them out, on the shared state."""

    def __init__(
        self, state: NodeState, places: Places, room: Room, residency: Residency, images: Images
    ) -> None:
        self._state = state
        self._places = places
        self._room = room
        self._residency = residency
        self._images = images
        self._replacement: Replacement | None = None
        self._searching = False
        self._tick_at = 0.0
        self._steps: deque[Change] = deque()
        self._step_ends = 0.0
        self._copying = False

    # ------------------------------------------------------------------------------- its turn

    @property
    def enabled(self) -> bool:
        """Whether this node plans: devices that are dealt out once and for all have nothing to plan."""
        settings = self._state.settings
        return settings.replacement.enabled and settings.policy.scheduler != "dedicated"

    def settle(self) -> None:
        """Go on with the plan at hand; have another made when that is due."""
        if not self._steps and self._state.now < self._tick_at:
            return  # as after most events
        if not self.enabled or self._state.draining:
            return
        if self._steps:
            self._go_on()
        elif self._is_ready():
            self._tick_at = self._state.now + TICK_SECONDS
            self._tick(self._replacement or self._begin())

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        if not self.enabled or self._state.draining:
            return inf
        if self._steps:
            return self._step_ends
        return self._tick_at if self._is_ready() else inf

    def next_wakeup(self) -> float:
        """When a Tick is wanted; inf: never, as on an idle node."""
        if not self.enabled or self._state.draining:
            return inf
        if self._steps:
            return self._step_ends
        return self._tick_at if self._state.requests else inf

    def forget(self) -> None:
        """The configuration has changed: begin anew. What has been moved so far stays."""
        self._replacement, self._tick_at = None, 0.0
        self._stop()
        self._state.planned = {}

    def found(self, plan: Plan) -> None:
        """The search has ended."""
        self._searching = False
        demands, replacement = self._demands(), self._replacement
        if replacement is None or not self._is_ready() or plan.replicas.keys() != {d.name for d in demands}:
            return  # services were refused, or devices lost, while it went on
        if broken(plan, demands, self._machine()):
            return  # a service came in meanwhile, with other ranks than the plan has for it
        replacement.planned(self._state.now, demands, self._current(), plan)
        self._state.planned = replacement.best(self._current()).replicas

    def status(self, now: float) -> PlanStatus | None:
        """The plan in force and the best one known; None while nothing is planned."""
        if self._replacement is None or not self._is_ready():
            return None
        return self._replacement.status(now, self._demands(), self._current(), self._running())

    def _is_ready(self) -> bool:
        """All devices are there to be planned with."""
        return all(d.arena is not None and not d.closed for d in self._state.devices.values())

    def _begin(self) -> Replacement:
        self._replacement = Replacement(self._machine(), self._state.settings.replacement)
        return self._replacement

    def _tick(self, replacement: Replacement) -> None:
        now, demands, current = self._state.now, self._demands(), self._current()
        if not demands:
            return
        if not self._searching and replacement.wants_plan(now, demands) and not self._stuck(demands):
            self._searching = True
            self._state.actions.append(SearchPlan(tuple(demands), self._machine(), current))
        steps = replacement.tick(now, demands, current, self._running())
        if steps:
            self._state.note("", f"moving to a better plan in {len(steps)} steps")
            self._steps = deque(steps)
            self._begin_step()

    def _stuck(self, demands: list[Demand]) -> bool:
        """Whether what operators have placed cannot be there all at once: it takes turns, unplanned."""
        fixed = Plan({demand.name: demand.placed or () for demand in demands})
        return bool(broken(fixed, demands, self._machine()))

    # ------------------------------------------------------------------------------- in planning's words

    def _machine(self) -> Machine:
        settings = self._state.settings
        arenas = [device.arena for device in self._state.devices.values()]
        return Machine(
            arena_bytes=tuple(a.capacity * settings.block_bytes if a is not None else 0 for a in arenas),
            copy_bytes_per_second=settings.roofline.copy_bytes_per_second,
            max_rows=settings.policy.max_rows,
            apart=self._apart(),
        )

    def _apart(self) -> tuple[tuple[str, str], ...]:
        sharing, names = self._state.sharing, self._state.services
        if not sharing.groups:
            return ()
        return tuple((one, other) for one in names for other in names if sharing.apart(one, other))

    def _current(self) -> Plan:
        """Where services are or are going; what is on its way out is gone."""
        return Plan(
            {
                service.name: tuple(r.devices for r in service.replicas if r.stage is not Stage.DRAINING)
                for service in self._plannable()
            }
        )

    def _running(self) -> dict[str, int]:
        return {service.name: sum(1 for _ in service.running) for service in self._plannable()}

    def _plannable(self) -> list[Service]:
        services = self._state.services.values()
        return [s for s in services if s.shape is not None and not s.refused and not s.outgoing]

    def _demands(self) -> list[Demand]:
        return [self._demand(service) for service in self._plannable()]

    def _demand(self, service: Service) -> Demand:
        assert service.shape is not None
        assert service.profile is not None
        rate = service.arrivals.value(self._state.now)
        return Demand(
            name=service.name,
            rate=rate,
            prompt_tokens=service.profile.prompt_tokens,
            output_tokens=service.profile.output_tokens,
            splits=tuple(self._split(service, ranks) for ranks in self._feasible_ranks(service)),
            least_tokens=service.settings.context or min(service.shape.context, 256),
            placed=self._placed(service, rate),
            importance=service.settings.importance,
        )

    def _placed(self, service: Service, rate: float) -> tuple[Devices, ...] | None:
        """Where it has to be, whatever would be best; None leaves it to the search."""
        here = tuple(replica.devices for replica in service.replicas)
        if service.settings.pinned and here:
            return here
        if not here and (service.evicted or rate < IDLE_RATE):
            return ()  # nobody asks for it: it is not for plans to bring in
        allowed = service.settings.devices
        if len(allowed) > 1:
            return here  # demand chooses among these; plans know of none that are merely allowed
        return allowed or None

    def _feasible_ranks(self, service: Service) -> list[int]:
        """While it is resident, those that it has: another number needs another host image."""
        assert service.shape is not None
        if service.replicas or service.settings.tensor_parallel:
            return [service.ranks]
        return [1, *(shard.ranks for shard in service.shape.shards)]

    def _split(self, service: Service, ranks: int) -> Split:
        """Measured costs for the ranks that it has, the roofline's for others."""
        assert service.shape is not None
        assert service.profile is not None
        shape, shard = service.shape, service.shape.shard(ranks)
        costs = service.profile.costs
        if ranks != service.ranks:
            costs = StepCosts.guess(self._state.settings.roofline, shape, ranks)
        kv = shape.itemsize * sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in shard.layers)
        return Split.of(ranks, sum(shard.segments), kv, costs)

    # ------------------------------------------------------------------------------- an operator's plan

    def load(self, service: Service, devices: Devices, ticket: int) -> None:
        """Bring a replica to devices of an operator's choice, if only idle services have to leave for it."""
        why = self._obstacle(service, devices)
        if not why and self._residency.bring(service, [self._state.devices[index] for index in devices]):
            service.load_tickets.append(ticket)
            return
        where = "+".join(map(str, devices))
        why = why or "what is there is busy, pinned, or came only just now"
        self._state.answer([ticket], f"{service.name} cannot come to device {where}: {why}")

    def _obstacle(self, service: Service, devices: Devices) -> str:
        """Why a service cannot come to devices, whoever is there; empty when it can."""
        if unknown := set(devices) - self._state.devices.keys():
            return f"there is no device {min(unknown)}"
        if len(devices) != service.ranks or len(set(devices)) != service.ranks:
            return f"it takes {service.ranks} at once"
        if service.image is not Image.READY:
            return "its weights have not been read yet; load it without naming a device"
        if any(service.name in self._state.devices[index].replicas for index in devices):
            return "it is there already, or was a moment ago"
        may = self._may_come(service, devices)
        return "" if may else "it is leaving, its last load failed, or a device is down or drained"

    def stand_in(self, service: Service) -> None:
        """Bring a replica to wherever there is room, so that requests of one that leaves can go on there."""
        need = self._places.need(service)
        places = [
            place
            for place in self._places.of(service)
            if available(place) >= need and all(service.name not in device.replicas for device in place)
        ]
        if service.image is Image.READY and places:
            self._residency.bring(service, max(places, key=available))

    # ------------------------------------------------------------------------------- applying a plan

    def _begin_step(self) -> None:
        self._step_ends = self._state.now + STEP_SECONDS
        self._copying = False

    def _go_on(self) -> None:
        """Do what the step at hand still needs; go to the next one when it is made."""
        while self._steps:
            step = self._steps[0]
            service = self._state.services[step.service]
            do = self._bring if isinstance(step, Bring) else self._drop
            made = do(service, step.devices)
            if made is None or self._state.now >= self._step_ends:
                verb = "come to" if isinstance(step, Bring) else "leave"
                where = "+".join(map(str, step.devices))
                self._give_up(step.service, f"it could not {verb} devices {where}")
                return
            if not made:
                return
            self._steps.popleft()
            self._begin_step()
            if self._steps and not self._holds():
                self._give_up("", "what is asked for has changed")
                return

    def _holds(self) -> bool:
        """Whether the rest of the plan is still worth going on with."""
        replacement = self._replacement
        return replacement is not None and replacement.holds(self._demands(), self._current())

    def _give_up(self, service: str, why: str) -> None:
        """Something else goes before the plan. What was done of it stays, and the next one starts there.

        But a service that has been made to leave for what does not come now is to come back, and one that was
        leaving stays.
        """
        self._state.note(service, f"the plan is given up: {why}")
        self._stop()

    def _stop(self) -> None:
        self._steps.clear()
        for other in self._plannable():
            for replica in other.replicas:
                replica.leaving = False
            if self._state.planned.get(other.name) and not (other.replicas or other.evicted):
                other.wanted = True

    def _at(self, service: Service, devices: Devices) -> Replica | None:
        return next((r for r in service.replicas if r.devices == devices), None)

    def _bring(self, service: Service, devices: Devices) -> bool | None:
        """Whether the replica is there; None when it cannot come."""
        replica = self._at(service, devices)
        if replica is not None:
            return replica.stage is Stage.RESIDENT
        place = [self._state.devices[index] for index in devices]
        if self._copying or not self._may_come(service, devices):
            return None  # its copy failed, or somebody pushed it out
        if len(devices) != service.ranks:
            self._residency.set_ranks(service, len(devices))
        if service.image is not Image.READY:
            self._images.want(service)
        elif all(self._has_spare_room(device, service) for device in place):
            self._copying = self._residency.bring(service, place)
        return False

    def _has_spare_room(self, device: Device, service: Service) -> bool:
        """Whether running requests have room to grow beside a newcomer: a move is no emergency."""
        arena = device.arena
        assert arena is not None
        idle = sum(arena.weights_of(replica.service) for replica in self._room.idle(device, service.name))
        left = arena.available + idle - self._state.weights_blocks(service)
        return left >= KV_GROWTH * arena.kv

    def _may_come(self, service: Service, devices: Devices) -> bool:
        busy = any(service.name in self._state.devices[index].replicas for index in devices)
        other_ranks = bool(service.replicas) and len(devices) != service.ranks
        paused = self._state.now < max(service.retry_at, service.image_retry_at)
        gone = bool(service.refused or service.evict_tickets or service.evicted or service.outgoing)
        if not self._is_ready() or busy or other_ranks or paused or gone:
            return False
        return self._places.holds_waiting(service, [self._state.devices[index] for index in devices])

    def _drop(self, service: Service, devices: Devices) -> bool | None:
        """Whether the replica is gone; None when it cannot go."""
        replica = self._at(service, devices)
        if replica is None:
            return True
        if service.settings.pinned or replica.stage is Stage.COPYING:
            return None
        replica.leaving = True
        if replica.stage is Stage.RESIDENT:
            patience = self._state.settings.policy.patience_seconds
            self._room.drain(replica, admit_below=0, seconds=patience)
        return False

"""After a failure: which requests start over, which end, and which services have to pause.

Owns the rules of blame. Must not know processes: the runtime starts them again, by itself.

A request survives the loss of its worker: its tokens are known here, and the same (seed, position) draws
the same token again. The requests of the step that failed are *suspects*: each has steps to itself
until it is past the point of the failure. So the one that is the cause fails alone, and ends, and no other
ends with it.

A service whose process died is brought in again at once. After the second death in a row, unless one request
was the cause, its *circuit breaker* opens (Nygard, Release It!, ch. 5): requests are refused with the time of
the next try, and each further death doubles the pause.
"""

from __future__ import annotations

from math import inf

from seallmd.core import dedicated
from seallmd.core.loads import MAX_RETRY_SECONDS, Loads
from seallmd.core.places import Places
from seallmd.core.request import Life, Request
from seallmd.core.room import Room
from seallmd.core.service import Image, Service, Stage
from seallmd.core.state import DOWN_SECONDS, Device, NodeState, SentStep

CRASHES_ALLOWED = 1  # of a service, in a row, before it pauses
CALM_SECONDS = 10.0  # a service that steps so long after a crash has recovered from it
DOWN_RETRY_SECONDS = 5.0  # Retry-After while a device is down that does not come back
ALL_DOWN = "no device that it could run on is up"
FAILURES_ALLOWED = 3  # of steps in company, in a row, before a request ends all the same


class Recovery:
    """Sorts out failures on the shared state."""

    def __init__(self, state: NodeState, places: Places, room: Room, loads: Loads) -> None:
        self._state = state
        self._room = room
        self._places = places
        self._loads = loads

    # ------------------------------------------------------------------------------- devices

    def worker_lost(self, index: int, reason: str) -> None:
        """A worker is gone with all that it held. It carried out one step at a time: the oldest one."""
        state, device = self._state, self._state.devices[index]
        state.lost_at.setdefault(index, state.now)
        device.state = "lost"
        step = next(iter(device.inflight.values()), None)
        guilty = step is not None and self._blame(step, "its worker process died", "worker_lost", 500)
        cause = self._cause(device, step)
        for replica in list(device.replicas.values()):
            self._room.break_up(replica)
        for sent in device.inflight.values():
            if sent.leader == index:
                void(state, sent)
        for service in state.services.values():
            service.former.pop(index, None)
            self._forget_unsaved(service, index)
        state.host_kv.lost(index)
        state.note("", f"device {index} lost: {reason}")
        state.devices[index] = Device(
            index, device.label, state="lost", arena_bytes=device.arena_bytes, closed=device.closed
        )
        state.moved()
        if cause is not None and not guilty:
            self._crashed(cause, f"its worker process died ({reason})")

    def _forget_unsaved(self, service: Service, index: int) -> None:
        """KV that the device was still copying to host memory is lost with it."""
        for request in [*service.waiting.values(), *service.running]:
            if request.saved is None or index not in request.saved.copying:
                continue
            if request.landing:
                self._state.restart(request)
            else:
                self._state.drop_saved(request)

    def worker_up(self, index: int) -> None:
        """The device is there again."""
        self._state.lost_at.pop(index, None)

    def settle(self) -> None:
        """Have nobody wait for ever for devices that do not come back."""
        if not self._state.lost_at or self._state.now < max(self._state.lost_at.values()) + DOWN_SECONDS:
            return
        for service in self._state.services.values():
            asked_for = service.waiting or service.load_tickets
            if asked_for and not service.replicas and not self._has_place(service):
                self._loads.pause(service, ALL_DOWN, DOWN_RETRY_SECONDS)

    def _has_place(self, service: Service) -> bool:
        """Whether devices that are up can take a service: one that is too small for it is of no use."""
        if dedicated.is_dedicated(self._state):
            return bool(self._places.of(service))  # all others leave, whoever they are
        return bool(self._places.able(service))

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`."""
        return -inf if self._state.lost_at else inf

    def next_wakeup(self) -> float:
        """When `settle` may have something to do; inf: never."""
        return max(self._state.lost_at.values()) + DOWN_SECONDS if self._state.lost_at else inf

    def _cause(self, device: Device, step: SentStep | None) -> Service | None:
        """The service that the worker was busy with, as far as is known here."""
        if step is not None:
            return self._state.services[step.service]
        for replica in device.replicas.values():
            if replica.stage is Stage.COPYING:
                return self._state.services[replica.service]
        return None

    # ------------------------------------------------------------------------------- steps

    def step_failed(self, device: Device, step: SentStep, reason: str, *, memory: bool) -> None:
        """A step raised. In a group every rank says so, and the first to do so ends the group."""
        service = self._state.services[step.service]
        replica = device.replicas.get(step.service)
        if replica is not None and replica.copy != step.copy:
            replica = None
        for behind in device.inflight.values():
            behind.incomplete = behind.incomplete or behind.service == step.service
        if step.leader == device.index:
            void(self._state, step)
        elif replica is None:  # its group is gone already; if it was evicted, its KV was saved and is known
            self._room.distrust_kv(service)
            return
        if memory:
            self._blame(step, "there was not enough memory to compute it", "out_of_memory", 503)
        else:
            self._blame(step, "the model failed on this request", "step_failed", 500)
        self._state.note(service.name, f"step failed: {reason}")
        if replica is not None and len(replica.devices) > 1:
            self._room.break_up(replica)  # its ranks are out of step for good

    def stepped(self, service: Service) -> None:
        """A step went well: after a while, what went wrong before is forgotten."""
        if service.crashes and self._state.now - service.crashed_at >= CALM_SECONDS:
            service.crashes = 0

    def advanced(self, request: Request) -> None:
        """A token of the request came."""
        if request.failures and not request.suspect:
            request.failures = 0
            self._state.services[request.service].suspects.discard(request.id)

    # ------------------------------------------------------------------------------- blame

    def _blame(self, step: SentStep, what: str, code: str, status: int) -> bool:
        """Have the requests of a failed step start over, or end. True when one of them was the cause."""
        guilty = False
        alone = len(step.rows) == 1
        for row in step.rows:
            request = row.request
            if request.life is Life.DONE:
                continue
            if row.epoch != request.epoch:  # it waits or moves: what this step was to write was never written
                if request.landing:
                    self._state.restart(request)
                else:
                    self._state.drop_saved(request)
                    request.trusted = request.epoch
                continue
            request.failures += 1
            if (alone and request.failures > 1) or request.failures > FAILURES_ALLOWED:
                guilty = guilty or alone
                retry = 1.0 if status == 503 else 0.0
                self._state.finish(request, "failed", what, code=code, status=status, retry_after=retry)
                continue
            request.alone_until = len(request.tokens)
            self._state.services[request.service].suspects.add(request.id)
            self._state.restart(request)
            self._state.note(request.service, f"request {request.id} starts over: {what}")
        return guilty

    def _crashed(self, service: Service, reason: str) -> None:
        """A process died of a service; the breaker opens when that happens again and again."""
        state = self._state
        service.crashes += 1
        service.crashed_at = state.now
        if service.crashes <= CRASHES_ALLOWED:
            return
        pause = min(MAX_RETRY_SECONDS, 2.0 ** (service.crashes - CRASHES_ALLOWED - 1))
        self._loads.pause(service, f"{reason}, {service.crashes} times in a row", pause)

    # ------------------------------------------------------------------------------- host process

    def host_lost(self, reason: str) -> None:
        """The host process is gone, with the images that nobody has mapped and the job it was busy with."""
        state = self._state
        state.note("", f"host process lost: {reason}")
        if not state.host_up:
            return  # it died while it was starting, of itself
        state.host_up = False
        for service in state.services.values():
            was, service.image = service.image, Image.NONE
            if was is Image.BUILDING:
                self._lost_image(service, "the loader process died while it read the weights")
        if examined := state.services.get(state.examined):
            self._crashed_in_probe(examined)
        state.examined = ""
        for service in state.services.values():
            service.progress = None if service.shape is None else service.progress

    def _lost_image(self, service: Service, reason: str) -> None:
        """The breaker is for those who wait for the image: a service that is there serves without it."""
        if service.replicas:
            self._loads.image_failed(service, reason)
        else:
            self._crashed(service, reason)

    def _crashed_in_probe(self, service: Service) -> None:
        service.crashes += 1
        if service.crashes > CRASHES_ALLOWED:
            service.crashes = 0
            self._loads.refuse(service, "the loader process died twice while it examined the model")


def void(state: NodeState, step: SentStep) -> None:
    """The step's rows will never come back."""
    state.services[step.service].changed()
    for row in step.rows:
        if row.request.life is not Life.DONE:
            row.request.inflight -= 1
            row.request.drawn -= row.sample

"""What the last minutes looked like: a sample a second, and what happened between two of them.

Owns a bounded ring of samples and of happenings, so that a page opened now shows the past. Must not know
HTTP, nor decide anything: it reads reports.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from seallmd.api.latency_window import WINDOW_SECONDS, LatencyWindow, Percentiles
from seallmd.core.status import DeviceStatus, NodeStatus, ServiceStatus

SAMPLE_SECONDS = 1.0
KEPT_HAPPENINGS = 200
RECENT_SECONDS = 15  # what the percentiles of a sample are of


class ServiceSample(msgspec.Struct, frozen=True, array_like=True):
    """A service at a moment; fields as in `ServiceStatus`."""

    state: str
    running: int
    waiting: int
    tokens_per_second: float


class Sample(msgspec.Struct, frozen=True):
    """A moment. number: counted from 1. time: seconds since 1970. Percentiles are of the seconds before it,
    over all services. steps: so far, by device."""

    number: int
    time: float
    services: dict[str, ServiceSample]
    steps: dict[int, int]
    first_token: Percentiles | None
    next_token: Percentiles | None


class Happening(msgspec.Struct, frozen=True):
    """Something an operator may want to know.

    number: counted from 1. time: seconds since 1970. kind: "in" and "out" (of a device), "failure",
    "preemption", "device" or "daemon". service: whom it concerns, empty = none. text: a few words.
    """

    number: int
    time: float
    kind: str
    service: str
    text: str


class History:
    """Takes samples from `start` to `stop`."""

    def __init__(
        self,
        status: Callable[[], NodeStatus],
        window: LatencyWindow,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._status = status
        self._window = window
        self._wall_clock = wall_clock
        self._samples: deque[Sample] = deque(maxlen=int(WINDOW_SECONDS / SAMPLE_SECONDS))
        self._happenings: deque[Happening] = deque(maxlen=KEPT_HAPPENINGS)
        self._before: NodeStatus | None = None
        self._count = 0
        self._told = 0
        self._sampled = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take the first sample, and then one a second."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def latest(self) -> int:
        """The number of the last sample; 0 before the first."""
        return self._count

    def samples(self, after: int) -> list[Sample]:
        """Those that are remembered, of higher numbers."""
        return [sample for sample in self._samples if sample.number > after]

    def happenings(self, after: int) -> list[Happening]:
        """Those that are remembered, of higher numbers."""
        return [happening for happening in self._happenings if happening.number > after]

    async def newer(self, after: int) -> None:
        """Wait for a sample of a higher number."""
        async with self._sampled:
            await self._sampled.wait_for(lambda: self._count > after)

    async def _run(self) -> None:
        while True:
            await self.take()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def take(self) -> None:
        """Take a sample now."""
        status, now = self._status(), self._wall_clock()
        if self._before is not None:
            for kind, service, text in _changes(self._before, status):
                self._told += 1
                self._happenings.append(Happening(self._told, now, kind, service, text))
        self._before = status
        recent = self._window.recent(RECENT_SECONDS)
        self._count += 1
        self._samples.append(
            Sample(
                self._count,
                now,
                {service.name: _service_sample(service) for service in status.services},
                {device.device: device.steps for device in status.devices},
                recent.first_token,
                recent.next_token,
            )
        )
        async with self._sampled:
            self._sampled.notify_all()


def _service_sample(service: ServiceStatus) -> ServiceSample:
    rate = round(service.tokens_per_second, 1)
    return ServiceSample(service.state, service.running, service.waiting, rate)


# ----------------------------------------------------------------------- what happened between two reports

_Change = tuple[str, str, str]  # kind, service, text


def _changes(before: NodeStatus, after: NodeStatus) -> Iterator[_Change]:
    if after.draining and not before.draining:
        yield "daemon", "", "takes no new requests: it is about to stop"
    devices = {device.device: device for device in before.devices}
    for device in after.devices:
        if (old_device := devices.get(device.device)) is not None:
            yield from _device_changes(old_device, device)
    services = {service.name: service for service in before.services}
    for service in after.services:
        if (old_service := services.get(service.name)) is not None:
            yield from _service_changes(old_service, service)


def _device_changes(before: DeviceStatus, after: DeviceStatus) -> Iterator[_Change]:
    if after.state != before.state:
        yield "device", "", f"device {after.device} is {after.state}"
    elif after.pid != before.pid:
        yield "device", "", f"device {after.device} has a new worker"


def _service_changes(before: ServiceStatus, after: ServiceStatus) -> Iterator[_Change]:
    """In and out are told by counters and places: a swap may be over between two reports."""
    for group in before.groups:
        if group not in after.groups:
            yield "out", after.name, f"left {_place(group)}"
    if (swaps := after.swaps_in - before.swaps_in) > 0:
        where = f" on {_place(after.groups[-1])}" if after.groups else ""
        times = f", {swaps} times" if swaps > 1 else ""
        yield "in", after.name, f"came in{where} in {after.last_swap_seconds:.3f} s{times}"
    if after.reason and after.reason != before.reason:
        yield "failure", after.name, after.reason
    if (preempted := after.preemptions - before.preemptions) > 0:
        plural = "request was" if preempted == 1 else "requests were"
        yield "preemption", after.name, f"{preempted} {plural} preempted"


def _place(group: tuple[int, ...]) -> str:
    """As people say it: "device 0", "devices 0+1"."""
    return f"device{'s' if len(group) > 1 else ''} {'+'.join(map(str, group))}"

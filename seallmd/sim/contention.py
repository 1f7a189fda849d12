"""Steps that slow each other down, because their devices share one memory: CPU workers of one machine.

Owns which steps run at this moment and how far each has come. Must not know what a step does, nor how long it
takes alone (`timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

_DONE = 1e-9  # seconds that rounding may leave over


class Clock(Protocol):
    """What is needed of the world."""

    @property
    def now(self) -> float:
        """Virtual seconds."""

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something later."""


@dataclass(slots=True)
class _Running:
    """A step. left: seconds that it would still take alone."""

    left: float
    began: float
    ended: Callable[[float], None]


class Contention:
    """Steps in progress on the devices of one machine.

    slowdown: of each device that contends, by how much its steps are slower for each other one that runs a
    step too, as a share.
    """

    def __init__(self, clock: Clock, slowdown: Mapping[int, float]) -> None:
        self._clock = clock
        self._slowdown = slowdown
        self._running: dict[int, _Running] = {}
        self._looked_at = 0.0
        self._changes = 0

    def contends(self, device: int) -> bool:
        """Whether steps of the device have to be run here."""
        return device in self._slowdown

    def run(self, device: int, seconds: float, ended: Callable[[float], None]) -> None:
        """Run a step that would take `seconds` alone; `ended` is told how long it has taken."""
        self._advance()
        self._running[device] = _Running(seconds, self._clock.now, ended)
        self._await_next()

    def stop(self, device: int) -> None:
        """The device is gone, with what it ran."""
        self._advance()
        if self._running.pop(device, None) is not None:
            self._await_next()

    def _pace(self, device: int) -> float:
        """Seconds of progress in one second."""
        return 1 / (1 + self._slowdown[device] * (len(self._running) - 1))

    def _advance(self) -> None:
        now = self._clock.now
        for device, step in self._running.items():
            step.left -= (now - self._looked_at) * self._pace(device)
        self._looked_at = now

    def _await_next(self) -> None:
        """Look again when the first of them is done, unless something changes before."""
        self._changes += 1
        if self._running:
            ends = min(step.left / self._pace(device) for device, step in self._running.items())
            self._clock.after(max(0.0, ends), partial(self._look, self._changes))

    def _look(self, changes: int) -> None:
        if changes != self._changes:
            return
        self._advance()
        done = [device for device, step in self._running.items() if step.left <= _DONE]
        steps = [self._running.pop(device) for device in done]
        self._await_next()
        for step in steps:
            step.ended(self._clock.now - step.began)

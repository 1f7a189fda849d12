"""Which model the host process examines next, so that its service can be served.

Owns the order: one at a time, those that somebody asks for before the others, and last those that the
process may have died of. A node has many models, each takes most of a second, and the host process does its
jobs in the order in which they are given: all of them at once would keep the first request waiting for the
last model. Must not know what comes of it (`loads`, `residency`).
"""

from __future__ import annotations

from math import inf

from seallmd.core.events import ToHostProcess
from seallmd.core.messages import Probe
from seallmd.core.service import Service
from seallmd.core.state import NodeState


class Examination:
    """Has the services examined, on the shared state."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    def settle(self) -> None:
        """Have the next one examined when the last one has been."""
        state = self._state
        if not state.host_up or state.examined:
            return
        unknown = [service for service in state.services.values() if service.shape is None]
        waiting = [service for service in unknown if awaits_examination(service)]
        if not waiting:  # as after most events
            return
        service = min(waiting, key=lambda s: (s.crashes, not (s.hurried or s.demand)))
        settings, state.examined = service.settings, service.name
        probe = Probe(service.name, settings.model, settings.dtype, settings.context)
        state.actions.append(ToHostProcess(probe))

    @property
    def calm_until(self) -> float:
        """As `wakeup.Part`: steps that end have nothing to do with it."""
        return inf

    def over(self, name: str) -> None:
        """The host process has examined a service, or fetches its files, which it does beside other jobs."""
        if self._state.examined == name:
            self._state.examined = ""


def awaits_examination(service: Service) -> bool:
    """Whether a service is still to be examined, and its files are not on their way."""
    known = service.shape is not None or service.refused or service.progress is not None
    return not known and not service.outgoing

"""Sends devices their steps.

Owns whose step goes next on a device, its replicas' in the policy's order and groups' in turn with their
neighbours, and what a step is told of time and threads. Must not choose by itself (`scheduler`), nor form
steps (`batcher`).
"""

from __future__ import annotations

from msgspec.structs import replace

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.core.batcher import Batcher
from seallmd.core.lending import speedup, threads_for
from seallmd.core.room import Room
from seallmd.core.scheduler import POLICIES
from seallmd.core.service import Replica
from seallmd.core.state import Device, NodeState

KNOWN_STEPS = 50  # of a service, before its steps' times count as known
# A group that could run nothing is waited for again, even if nothing has moved: the end of another's claim
# and a policy's quotas are not seen.
RETRY_SECONDS = 1.0


class Dispatch:
    """Sends steps on the shared state, by the policy of its settings at the time."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._policy = POLICIES[state.settings.policy.scheduler]()
        self._batcher = Batcher(state, room, self._policy.admits)

    def fill(self, devices: list[Device]) -> None:
        """Send steps until each device holds as many as it may, or nothing can run there."""
        depth = self._state.settings.policy.pipeline_depth
        for device in devices:
            while len(device.inflight) < depth and device.replicas and self._send_next(device):
                pass

    def _is_full(self, device: Device) -> bool:
        return len(device.inflight) >= self._state.settings.policy.pipeline_depth

    def _send_next(self, device: Device) -> bool:
        """Send the step that goes next on a device; False when nothing can run there now."""
        ready = [replica for replica in device.replicas.values() if self._batcher.has_work(replica)]
        if not ready:
            return False
        for replica in self._in_turn(device, ready):
            # Forming a step for one may have evicted the next.
            if device.replicas.get(replica.service) is not replica:
                continue
            group = self._state.group(replica)
            if len(group) > 1 and not all(self._takes(member, replica, device) for member in group):
                if self._is_stuck(replica):
                    continue  # or it would keep those from getting done who have the memory that it waits for
                self._reserve(replica, group, device)
                return False
            steps = self._batcher.form(replica)
            for member, step in steps:
                self._send(member, step)
            if len(group) > 1:
                self._had_turn(replica, group, stuck=not steps)
            if steps:
                return True
        return False

    def _had_turn(self, replica: Replica, group: list[Device], *, stuck: bool) -> None:
        """A replica on several devices is waited for no longer; nor again soon, if it could run nothing."""
        state = self._state
        for device in group:
            if device.reserved is replica:
                device.reserved = None
        if stuck:
            until = state.now + RETRY_SECONDS
            state.services[replica.service].stuck[replica.copy] = state.moves, until

    def _is_stuck(self, replica: Replica) -> bool:
        """Whether a replica on several devices could run nothing lately, and nothing has happened since."""
        state = self._state
        moves, until = state.services[replica.service].stuck.get(replica.copy, (-1, 0.0))
        return moves == state.moves and state.now < until

    def _send(self, device: Device, step: msg.Step) -> None:
        """Send a step on as many threads as there are for it now, and say how long it should take."""
        state, sent = self._state, device.inflight[step.step]
        profile, own = state.services[step.service].profile, state.settings.threads
        assert profile is not None
        costs = profile.costs
        seconds = costs.predict(sent.tokens, sent.context, sent.drawing)
        if own and (threads := threads_for(state, device)) > own:
            sent.speedup = speedup(threads, own, seconds, costs.predict(0, 0))
            step = replace(step, threads=threads)
        expected = seconds if costs.steps >= KNOWN_STEPS else 0.0  # too few were seen to tell
        state.actions.append(ev.ToDevice(device.index, step, expected))

    def _in_turn(self, device: Device, ready: list[Replica]) -> list[Replica]:
        """The policy's order; a replica on several devices that has been waiting for another goes first."""
        order = self._policy.order(self._state, device, ready)
        if len(order) > 1:  # batch work in the gaps that the others leave
            order = sorted(order, key=self._batcher.only_deferred)
        first = device.reserved
        if first in ready:
            order = [first, *(replica for replica in order if replica is not first)]
        else:
            device.reserved = None  # what it waited to run has ended: other groups may have their turn
        return order

    def _takes(self, device: Device, replica: Replica, chooser: Device) -> bool:
        """Whether a device takes the next step of a replica that another of its devices has chosen."""
        if self._is_full(device):
            return False
        return device is chooser or device.reserved is replica or not self._owes_turn(device, replica)

    def _reserve(self, replica: Replica, group: list[Device], chooser: Device) -> None:
        """Have a replica go next on all its devices, so that a busy one is waited for by a step at most."""
        for device in group:
            if device.reserved is None and (device is chooser or not self._owes_turn(device, replica)):
                device.reserved = replica

    def _owes_turn(self, device: Device, replica: Replica) -> bool:
        """Whether a device has to be asked before a replica goes there once more, because others have work.

        They would never get a turn, as long as another of the replica's devices has nothing else to do. An
        idle device is not asked: groups that overlap in a ring might all wait for each other's.
        """
        if not device.inflight:
            return False
        others = (other for other in device.replicas.values() if other is not replica)
        return device.last_served == replica.service and any(map(self._batcher.has_work, others))

"""What happens to a node, and what it wants done: the two vocabularies of `Node.handle`.

Owns the structs alone. Must not know who produces or carries them out. Events are complete: the journal is a
list of (now, event), and nothing else is needed to repeat a run.
"""

from __future__ import annotations

import msgspec

from seallmd.core.messages import (
    BlocksCopied,
    CopyDone,
    CopyFailed,
    ImageFailed,
    ImageReady,
    JobProgress,
    Pooled,
    Probed,
    ProbeFailed,
    Sampling,
    Scores,
    StepDone,
    StepFailed,
    ToHost,
    ToWorker,
)
from seallmd.core.plan import Demand, Machine, Plan
from seallmd.core.settings import GroupSettings, PolicySettings, ReplacementSettings, ServiceSettings
from seallmd.core.tiers import Tier as Tier


class _Tagged(msgspec.Struct, frozen=True, tag=True, gc=False):
    pass


# -------------------------------------------------------------------------------------------- events


class Arrived(_Tagged, frozen=True):
    """A request. prompt: token ids. max_tokens: most tokens to generate; 0 for one whose prompt is pooled
    (`sampling`), and for no other. stop_ids: ids that end it.

    salt: prefixes are shared only among equal salts. leader: a request with the same prompt that arrived just
    before (n > 1): this one waits for the leader's prefill, to share it; 0 = none. tier: how urgent it is
    (`core.tiers`).
    """

    request: int
    service: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()
    salt: str = ""
    leader: int = 0
    tier: Tier = "default"


class Cancelled(_Tagged, frozen=True):
    """The client is gone, or has all it wants (a stop string was seen)."""

    request: int


class LoadWanted(_Tagged, frozen=True):
    """An operator wants the service resident. `ticket` comes back in `Answer`.

    devices: a replica on just these, in rank order, beside those that it has; none: wherever it may be.
    """

    ticket: int
    service: str
    devices: tuple[int, ...] = ()


class EvictWanted(_Tagged, frozen=True):
    """An operator wants the service gone: once its work is done, or `now`, which ends its requests."""

    ticket: int
    service: str
    now: bool = False


class PinWanted(_Tagged, frozen=True):
    """An operator wants the service to stay, or no longer. Until the configuration says something new."""

    ticket: int
    service: str
    pinned: bool = True


class ServiceDrainWanted(_Tagged, frozen=True):
    """An operator wants the service to take no new requests; answered when the last one has ended.

    drained: False takes it back, as in the two below.
    """

    ticket: int
    service: str
    drained: bool = True


class DeviceDrainWanted(_Tagged, frozen=True):
    """An operator wants a device empty: nothing comes in, and what is there leaves once its requests have
    ended, pinned or not; answered when all are gone."""

    ticket: int
    device: int
    drained: bool = True


class NodeDrainWanted(_Tagged, frozen=True):
    """An operator wants the whole node to take no new requests; answered when the last one has ended."""

    ticket: int
    drained: bool = True


class KeepWanted(_Tagged, frozen=True):
    """A client wants the service to stay for so long after its last request; 0 = for good (Ollama)."""

    service: str
    seconds: float


class ExaminationWanted(_Tagged, frozen=True):
    """A client asks for a service of which the model has not been examined yet: it goes before others."""

    service: str


class Reconfigured(_Tagged, frozen=True):
    """The configuration was read again: from here on this holds, instead of what `NodeSettings` had."""

    services: tuple[ServiceSettings, ...]
    groups: tuple[GroupSettings, ...]
    policy: PolicySettings
    replacement: ReplacementSettings


class Tick(_Tagged, frozen=True):
    """Time has passed (see `Node.next_wakeup`)."""


class DrainWanted(_Tagged, frozen=True):
    """The node is to stop: refuse new requests and finish those it has; with `now`, fail them."""

    now: bool = False


class WorkerUp(_Tagged, frozen=True):
    """A device's worker is ready, with an empty arena."""

    device: int
    label: str
    arena_bytes: int
    pid: int = 0


class WorkerLost(_Tagged, frozen=True):
    """A device's worker is gone, with all that it held."""

    device: int
    reason: str


class HostUp(_Tagged, frozen=True):
    """The host process is ready and holds no image."""


class HostLost(_Tagged, frozen=True):
    """The host process is gone; images that workers have mapped stay theirs, the others are lost."""

    reason: str


class FromDevice(_Tagged, frozen=True):
    """A worker said something."""

    device: int
    message: JobProgress | CopyDone | CopyFailed | BlocksCopied | StepDone | StepFailed


class FromHostProcess(_Tagged, frozen=True):
    """The host process said something."""

    message: Probed | ProbeFailed | JobProgress | ImageReady | ImageFailed


class PlanFound(_Tagged, frozen=True):
    """The search for a plan has ended."""

    plan: Plan


OperatorEvent = (
    LoadWanted
    | EvictWanted
    | PinWanted
    | ServiceDrainWanted
    | DeviceDrainWanted
    | NodeDrainWanted
    | KeepWanted
)

Event = (
    Arrived
    | Cancelled
    | OperatorEvent
    | ExaminationWanted
    | Reconfigured
    | Tick
    | DrainWanted
    | WorkerUp
    | WorkerLost
    | HostUp
    | HostLost
    | FromDevice
    | FromHostProcess
    | PlanFound
)

# ------------------------------------------------------------------------------------------- actions


class ToDevice(_Tagged, frozen=True):
    """Send this to a device's worker.

    expects: seconds that a step should take, by what was learnt of its like; 0 = not known well enough.
    """

    device: int
    message: ToWorker
    expects: float = 0.0


class ToHostProcess(_Tagged, frozen=True):
    """Send this to the host process."""

    message: ToHost


class Emit(_Tagged, frozen=True):
    """Tokens of a request, in order. cached: prompt tokens that were not computed again (first Emit only)."""

    request: int
    tokens: tuple[int, ...]
    cached: int = 0


class Scored(_Tagged, frozen=True):
    """Log-probabilities that a request wants; each comes once, in order, and before the Emit of its token."""

    request: int
    scores: Scores


class Embedded(_Tagged, frozen=True):
    """A part of what pooling a request's prompt gives; each comes once, in order, without a gap."""

    request: int
    pooled: Pooled


class Finish(_Tagged, frozen=True):
    """A request is over; its last action.

    reason: "stop" (a stop id was drawn, and emitted; or the prompt has been pooled), "length", "cancelled" or
    "failed".
    error: a sentence for the client. code: OpenAI's error code. status: the HTTP status that fits.
    retry_after: seconds, 0 = trying again is pointless or unknown.
    """

    request: int
    reason: str
    error: str = ""
    code: str = ""
    status: int = 0
    retry_after: float = 0.0


class SearchPlan(_Tagged, frozen=True):
    """Search the best plan (`core.placement.place`, up to a second of computing); PlanFound answers."""

    demands: tuple[Demand, ...]
    machine: Machine
    near: Plan


class Answer(_Tagged, frozen=True):
    """An operator's command has ended. error: one line, empty when it succeeded."""

    ticket: int
    error: str = ""


class Note(_Tagged, frozen=True):
    """Something an operator may want to know: a swap, a preemption, a restart, a refusal, with the reason."""

    service: str
    text: str


Action = ToDevice | ToHostProcess | Emit | Scored | Embedded | Finish | Answer | Note | SearchPlan

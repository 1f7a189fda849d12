"""What a node tells of itself: plain structs for `status`, `/v1/models`, metrics and the pages.

Owns the shape of the report. `Node.status` fills it; nobody decides anything from it.
"""

from __future__ import annotations

import msgspec

from seallmd.core.plan import Devices, Plan
from seallmd.core.profile import ServiceProfile
from seallmd.core.settings import ServiceSettings
from seallmd.core.shapes import ModelShape


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device. Bytes add up: capacity = weights + kv + free; `cached` (reusable prefixes) is part of free.

    state: starting, up, lost. pid: of its worker, 0 while there is none. steps: steps run since it started.
    host_kv_bytes: preempted KV of this device that lies in host memory. drained: an operator wants it empty.
    """

    device: int
    label: str
    pid: int
    state: str
    capacity_bytes: int
    weights_bytes: int
    kv_bytes: int
    free_bytes: int
    cached_bytes: int
    steps: int
    host_kv_bytes: int = 0
    drained: bool = False


class ServiceStatus(msgspec.Struct, frozen=True):
    """One service.

    state: probing, refused, absent, reading (image), copying, resident, draining. stage: fraction done of a
    long job (0 to 1), None when none runs. device: where it is or is going, None when nowhere; devices: all
    of these; groups: the same by replica, in rank order. saves: preemptions whose KV went to host memory.
    migrations: requests that went on in another replica. reason: why it is refused, or why its last load
    failed. cost_error: how far predicted step times are off, as a share. tokens_per_second: output, over the
    last seconds. cached_tokens: of prompts, not computed again. swap_seconds: all copies together. drained:
    an operator wants no new requests for it. leaving: it has left the configuration. idle_seconds: since its
    last request, 0 while it has one; expires_seconds: until it leaves for being idle, None when it does not.
    coming_seconds: roughly how long a request has to wait for the model alone, 0 when it is resident.
    """

    name: str
    model: str
    state: str
    pinned: bool
    device: int | None
    stage: float | None
    weights_bytes: int
    kv_bytes: int
    context: int
    dtype: str
    running: int
    waiting: int
    tokens_per_second: float
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    swaps_in: int
    last_swap_seconds: float
    reason: str
    cost_error: float = 0.0
    devices: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    saves: int = 0
    migrations: int = 0
    cached_tokens: int = 0
    swap_seconds: float = 0.0
    drained: bool = False
    leaving: bool = False
    idle_seconds: float = 0.0
    expires_seconds: float | None = None
    coming_seconds: float = 0.0


class NodeStatus(msgspec.Struct, frozen=True):
    """The whole report. policy: the scheduler's. draining: no new requests are taken."""

    policy: str
    draining: bool
    block_bytes: int
    devices: tuple[DeviceStatus, ...]
    services: tuple[ServiceStatus, ...]


class Cell(msgspec.Struct, frozen=True, array_like=True):
    """A part of an arena. service: whose, else empty.

    kind: weights; copying (weights that are still on their way); kv; promised (a request's, with nothing in
    it yet); cached (free, but with a reusable prefix); free.
    """

    kind: str
    service: str


class Holding(msgspec.Struct, frozen=True):
    """Blocks of one service on one device. weights: with those on their way. kv: without promised ones."""

    service: str
    weights: int
    kv: int
    promised: int


class ArenaMap(msgspec.Struct, frozen=True):
    """A device's arena of `blocks` blocks, from the first to the last in cells of (nearly) equal size.

    holdings: exact, where cells show who holds most of them. claim: the service that free memory is kept for,
    empty while there is none.
    """

    device: int
    blocks: int
    cells: tuple[Cell, ...]
    holdings: tuple[Holding, ...] = ()
    claim: str = ""


class RequestStatus(msgspec.Struct, frozen=True):
    """One request that is not over.

    state: waiting or running. age_seconds: since it arrived. place: in its service's queue, 1 = next, 0 when
    it runs. device: where it runs, None while it waits. reason: why it waits, in a few words. tier: OpenAI's
    service_tier, or batch. cached_tokens: of the prompt, not computed again.
    """

    request: int
    service: str
    state: str
    device: int | None
    age_seconds: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    preemptions: int
    place: int
    reason: str
    tier: str = "default"
    cached_tokens: int = 0


class Place(msgspec.Struct, frozen=True):
    """A replica of a service. device: of rank 0; devices: of all ranks. state: copying, resident, draining.

    weights_bytes: on each device. idle_seconds: since its last step. operations: what of the model fast
    operations replaced, and how often.
    """

    device: int
    state: str
    weights_bytes: int
    running: int
    idle_seconds: float
    devices: tuple[int, ...] = ()
    operations: tuple[tuple[str, int], ...] = ()


class ServiceDetail(msgspec.Struct, frozen=True):
    """All that is known of one service. shape and profile (what was learnt) are None until it was probed.

    prompt_quantiles, output_quantiles: half of the requests, and 95% of them, are no longer, in tokens.
    """

    status: ServiceStatus
    settings: ServiceSettings
    shape: ModelShape | None
    profile: ServiceProfile | None
    kv_bytes_per_token: int
    places: tuple[Place, ...]
    prompt_quantiles: tuple[float, float] = (0.0, 0.0)
    output_quantiles: tuple[float, float] = (0.0, 0.0)


class ServicePlan(msgspec.Struct, frozen=True):
    """One service in a `PlanStatus`: where it is, where it is best, what either gives, and why in words."""

    service: str
    current: tuple[Devices, ...]
    best: tuple[Devices, ...]
    current_seconds_per_token: float
    best_seconds_per_token: float
    reason: str


class PlanStatus(msgspec.Struct, frozen=True):
    """The plan in force beside the best one known.

    regret: request-seconds lost so far by not having the best; cost: those that moving would lose.
    next_planning_seconds: until the next one, 0 when it is due. Normalized latencies in seconds per token,
    weighted by rates. steps: of the way to the best, in words.
    """

    current: Plan
    best: Plan
    regret: float
    cost: float
    next_planning_seconds: float
    current_normalized_latency: float
    best_normalized_latency: float
    services: tuple[ServicePlan, ...]
    steps: tuple[str, ...] = ()

"""What the operator chooses, as far as decisions depend on it.

Owns the structs, their units and ranges. Must not know files or TOML: `seallmd.config` reads those.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from seallmd.core.cost import ROOFLINES, Roofline
from seallmd.core.profile import ServiceProfile

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]


class ServiceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[service]]` table: a model and how it is to be served.

    name: what clients call it. model: a directory, a GGUF file, or a Hugging Face id. dtype: of weights and
    KV; "int8" is of weights alone, in blocks of 32 with a scale each (llama.cpp's Q8_0; experts that are one
    tensor stay 16-bit), with KV and all else as "bfloat16"; "auto" is the checkpoint's own (bfloat16 where it
    is none of these). context: limit of prompt plus
    output in tokens; 0 is the model's own limit, lowered to what the largest device can hold. pinned: never
    evicted to make room. preload: brought in at start. max_waiting: requests that may wait before new ones
    are refused. max_waiting_tokens: tokens of their prompts; 0 = as many as `[policy]` allows for all
    services. max_wait_seconds: one that would wait longer than this before it is begun, as far as can be
    told, is refused at once, so that targets of latency hold for those that are not; 0 = however long it
    takes. tensor_parallel: devices that each replica is split over; 0 = one, or as few as it takes. devices:
    the groups of devices that it may come in on, each as long as tensor_parallel, in rank order; empty =
    any. importance: what a second of its requests counts for when memory is scarce, beside 1 of others: who
    comes in, who leaves, and where plans put it. tool_parser: how the model writes tool calls; auto goes by
    its chat template. reasoning_parser: thoughts in `<think>` tags before the answer are told apart from
    it where the chat template knows them (auto), or are part of it (none). pooling: what /v1/embeddings makes
    of a text's last hidden states, their mean or the last one; none = the service gives no embeddings.
    idle_seconds: it leaves its device when nobody has asked it for anything for so long; 0 = never, and a
    pinned one never does.
    """

    name: Name
    model: str
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    context: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    pinned: bool = False
    preload: bool = False
    max_waiting: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    max_waiting_tokens: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    max_wait_seconds: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    tensor_parallel: Annotated[int, Meta(ge=0, le=8)] = 0
    devices: tuple[tuple[int, ...], ...] = ()
    importance: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    tool_parser: Literal["auto", "none", "hermes", "qwen", "llama3_json", "mistral"] = "auto"
    reasoning_parser: Literal["auto", "none"] = "auto"
    pooling: Literal["none", "mean", "last"] = "none"
    idle_seconds: Annotated[float, Meta(ge=0, le=31536000)] = 0.0


class GroupSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[group]]` table: services that may, or may not, be on one device at the same time.

    services: names of the members. share_members: whether members may be on one device with each other.
    share_others: whether they may be on one device with services outside the group. Two services may share a
    device when no group forbids it.
    """

    services: Annotated[tuple[Name, ...], Meta(min_length=1)]
    share_members: bool = True
    share_others: bool = True


class PolicySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[policy]` table.

    scheduler: which replica of a device steps next (`core.scheduler`). max_gap_rounds: `budget` lets no
    service that has work wait longer for a step than so many rounds of one step each. ageing: in `budget` a
    request counts by its slowdown so far to this power; 0 lets long ones wait. step_tokens: tokens in one
    step, prefill and decode together. max_rows: requests in one step. batch_slowdown: batch work makes a
    step that serves others too longer by this factor at most. pipeline_depth: steps a device may hold,
    running one included. prefix_reuse: share KV blocks of equal prefixes. replicate: a busy service may come
    in on an idle device too, when its steps would be faster. replicate_gain: faster by this factor at least.
    replicate_seconds: and so for this long already. migrate: running requests may move to another replica of
    their service, when tokens come faster so. migrate_gain: faster by this factor at least, for all requests
    of both devices together. split_efficiency: where there are at least as many
    devices as services, one whose tensor_parallel is 0 comes in on more devices than hold it as long as so
    large a share of their speed is kept (`core.splitting`); 1 = never. min_residency_swaps: how long a
    service that was brought in stays before another may push it out, in times of what bringing it in took; at
    most patience_seconds, and where nobody asks for it one such time, or until its next request is overdue.
    patience_seconds: how long a request of an absent service waits before a busy service is asked to make
    room. max_waiting_tokens: tokens of all requests that wait, of all services together, before new ones are
    refused.
    """

    scheduler: Literal["budget", "round-robin", "fcfs", "adbs", "dedicated"] = "budget"
    max_gap_rounds: Annotated[float, Meta(ge=1, le=1000)] = 1.5
    ageing: Annotated[float, Meta(ge=0, le=10)] = 2.0
    step_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 512
    max_rows: Annotated[int, Meta(ge=1, le=4096)] = 64
    batch_slowdown: Annotated[float, Meta(ge=1, le=100)] = 1.25
    pipeline_depth: Annotated[int, Meta(ge=1, le=4)] = 2
    prefix_reuse: bool = True
    replicate: bool = True
    replicate_gain: Annotated[float, Meta(ge=1, le=100)] = 1.2
    replicate_seconds: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    migrate: bool = True
    migrate_gain: Annotated[float, Meta(ge=1, le=100)] = 1.1
    split_efficiency: Annotated[float, Meta(ge=0.1, le=1)] = 1.0
    min_residency_swaps: Annotated[float, Meta(ge=0, le=1000)] = 8.0
    patience_seconds: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    max_waiting_tokens: Annotated[int, Meta(ge=1, le=1 << 32)] = 1 << 23


class ReplacementSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[replacement]` table: how eagerly plans are looked for and moved to.

    enabled: without it, services come and go by demand alone. min_interval_seconds, max_interval_seconds:
    between two plannings; doubled from one to the other while nothing changes. drift: a rate that changed by
    this factor since it was planned for brings the next planning forward. least_gain: a plan whose normalized
    latency is better by less than this share is taken for no better.
    """

    enabled: bool = True
    min_interval_seconds: Annotated[float, Meta(gt=0, le=86400)] = 15.0
    max_interval_seconds: Annotated[float, Meta(gt=0, le=86400)] = 600.0
    drift: Annotated[float, Meta(gt=1, le=1000)] = 2.0
    least_gain: Annotated[float, Meta(ge=0, lt=1)] = 0.02


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that `core.node.Node` is built from.

    devices: how many there are; roofline: of what kind, for predictions before anything was measured.
    profiles: what earlier runs learnt of services, by name. block_bytes: the unit of every arena. host_bytes:
    what host images may take together before the least recently used are dropped; one may always be built.
    host_kv_bytes: host memory of each device for preempted KV. kv_layout: whether a block holds all layers of
    its tokens ("merged") or one ("split"). threads: math threads of each CPU device, which those that have
    nothing to do lend to the others (`core.lending`); 0 = none are lent.
    """

    services: tuple[ServiceSettings, ...]
    devices: Annotated[int, Meta(ge=1, le=1024)]
    block_bytes: Annotated[int, Meta(ge=1)]
    host_bytes: int
    roofline: Roofline = ROOFLINES["cpu"]
    profiles: dict[str, ServiceProfile] = {}
    policy: PolicySettings = PolicySettings()
    host_kv_bytes: int = 0
    kv_layout: Literal["merged", "split"] = "merged"
    replacement: ReplacementSettings = ReplacementSettings()
    groups: tuple[GroupSettings, ...] = ()
    threads: int = 0

"""What is said on the control socket: one JSON object per line, in either direction.

Owns these messages and their limits. Must not know sockets, nor how commands are carried out.

    {"op": "status"}                             -> {"kind": "status", "status": {...}, "daemon": {...}}
    {"op": "map", "cells": 64}                   -> {"kind": "map", "maps": [...], "latencies": {...}}
    {"op": "show", "service": "a"}               -> {"kind": "service", "service": {...}} or error
    {"op": "requests"}                           -> {"kind": "requests", "requests": [...]}
    {"op": "batches"}                            -> {"kind": "batches", "batches": [...]}; "cancel": id -> ok
    {"op": "plan"}                               -> {"kind": "plan", "plan": {...}} (null: nothing is planned)
    {"op": "cancel", "request": 7}               -> ok or error
    {"op": "load", "service": "a"}               -> {"kind": "progress", ...}* then ok or error
    {"op": "evict", "service": "a", "now": true} -> {"kind": "progress", ...}* then ok or error
    {"op": "pin", "service": "a", "on": false}   -> ok or error; "on": false takes back, drains too
    {"op": "drain", "service": "a"}              -> ok once it is drained; or "device": 0, or neither: all
    {"op": "events", "last": 9, "follow": true}  -> {"kind": "event", ...}*, then ok unless it follows
    {"op": "reload"}                             -> {"kind": "reloaded", "changed": [...], "restart": [...]}
    ok is {"kind": "ok"}, error is {"kind": "error", "message": "..."}
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from seallmd.api.batch.operator import BatchStatus
from seallmd.api.latency_window import Figures
from seallmd.core.status import ArenaMap, NodeStatus, PlanStatus, RequestStatus, ServiceDetail
from seallmd.runtime.feed import Happening


class Request(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True):
    """What a client asks for."""


class Status(Request, frozen=True):
    """The report of this moment."""


class Map(Request, frozen=True):
    """Who holds which part of each arena, in so many cells; and how long requests took lately."""

    cells: Annotated[int, Meta(ge=1, le=4096)] = 64


class Show(Request, frozen=True):
    """All that is known of a service."""

    service: str


class Requests(Request, frozen=True):
    """Every request that is not over."""


class Batches(Request, frozen=True):
    """Batches of /v1/batches; or end one."""

    cancel: str = ""


class Plan(Request, frozen=True):
    """Where services are, and where they would be better."""


class Cancel(Request, frozen=True):
    """End a request; its client gets an error."""

    request: int


class Load(Request, frozen=True):
    """Bring a service in. devices: where another replica of it is to be, in rank order; empty = anywhere."""

    service: str
    devices: tuple[int, ...] = ()


class Evict(Request, frozen=True):
    """Take a service out: once its work is done, or `now`."""

    service: str
    now: bool = False


class Pin(Request, frozen=True):
    """Keep a service from leaving, or no longer."""

    service: str
    on: bool = True


class Drain(Request, frozen=True):
    """Take no new requests (of a service, or at all), or have a device empty; or no longer."""

    service: str = ""
    device: int | None = None
    on: bool = True


class Events(Request, frozen=True):
    """What happened last, and with `follow` what happens from now on."""

    last: Annotated[int, Meta(ge=0, le=100000)] = 20
    follow: bool = False


class Reload(Request, frozen=True):
    """Read the configuration again."""


class Reply(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """What it is told."""


class Ok(Reply, frozen=True, tag="ok"):
    """The command succeeded."""


class Failed(Reply, frozen=True, tag="error"):
    """The command cannot be carried out, and why (one line)."""

    message: str


class Progress(Reply, frozen=True, tag="progress"):
    """How far a load is; fields as in `ServiceStatus`."""

    service: str
    state: str
    stage: float | None
    device: int | None


class About(msgspec.Struct, frozen=True):
    """The daemon itself. http: where HTTP is served, as `server.http_addresses` has it."""

    version: str
    pid: int
    http: tuple[str, ...]


class Report(Reply, frozen=True, tag="status"):
    """The answer to `Status`."""

    status: NodeStatus
    daemon: About


class Detail(Reply, frozen=True, tag="service"):
    """The answer to `Show`."""

    service: ServiceDetail


class Picture(Reply, frozen=True, tag="map"):
    """The answer to `Map`. latencies: by service."""

    maps: list[ArenaMap]
    latencies: dict[str, Figures]


class RequestList(Reply, frozen=True, tag="requests"):
    """The answer to `Requests`, the most senior first."""

    requests: list[RequestStatus]


class BatchList(Reply, frozen=True, tag="batches"):
    """The answer to `Batches`: those that go on, and after them the last that are over."""

    batches: list[BatchStatus]


class Event(Reply, frozen=True, tag="event"):
    """One answer to `Events`."""

    event: Happening


class Reloaded(Reply, frozen=True, tag="reloaded"):
    """The configuration was read again: what has changed with it, and what waits for a restart."""

    changed: list[str]
    restart: list[str]


class PlanReport(Reply, frozen=True, tag="plan"):
    """The answer to `Plan`; None while nothing is planned."""

    plan: PlanStatus | None


Command = (
    Status | Map | Show | Requests | Batches | Plan | Cancel | Load | Evict | Pin | Drain | Events | Reload
)

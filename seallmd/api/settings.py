"""What the operator chooses of the HTTP side: the `[http]` table.

Owns the struct, its units and ranges. Must not know files or aiohttp.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class TierSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[tier]]` table: what requests of a tier are to get; `seallmd_slo_requests` counts how many did.

    name: as API keys have it. first_token_seconds: from arrival. next_token_seconds: mean of all further
    ones. Nothing is decided by these targets yet. The page measures by those of "default".
    """

    name: Literal["priority", "default", "flex"]
    first_token_seconds: Annotated[float, Meta(gt=0, le=86400)]
    next_token_seconds: Annotated[float, Meta(gt=0, le=86400)]


class HttpSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where and how HTTP is served.

    host: address to listen on; empty = no TCP. port: 0 = any free one. socket: path of a Unix socket that
    serves the same; empty = none. max_body_bytes: larger requests are refused with 413.
    keep_alive_seconds: how long an idle connection stays open. ping_seconds: a stream that has been silent
    for so long (its request waits for its model, or in the queue) gets a comment, so that proxies keep it
    open; 0 = never, because the first comment takes the headers along, and a failure after that has no HTTP
    status of its own. write_seconds: a client that takes nothing of its stream for so long is cut off. keys:
    file with API keys (`api.keys`); empty = the systemd credential "api-keys" if there is one, else none are
    needed. open_paths: what needs no key; everything else does once there are keys. cors_origins: web pages
    of these origins may call from browsers, "*" = of any; none may by default. tls_certificate, tls_key: PEM
    files; with both, TCP speaks TLS alone.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    socket: str = ""
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 16 << 20
    keep_alive_seconds: Annotated[float, Meta(ge=0, le=86400)] = 75.0
    ping_seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    write_seconds: Annotated[float, Meta(gt=0, le=86400)] = 120.0
    keys: str = ""
    open_paths: tuple[str, ...] = ("/", "/health", "/ready", "/version")
    cors_origins: tuple[str, ...] = ()
    tls_certificate: str = ""
    tls_key: str = ""


class BatchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[batches]` table: /v1/files and /v1/batches.

    directory: where files and the state of batches are kept; empty = systemd's StateDirectory, else
    $XDG_STATE_HOME/seallmd or ~/.local/state/seallmd. max_file_bytes: larger uploads are refused.
    max_line_bytes, max_lines: of the input of a batch. max_files, max_batches: that a key may have, batches
    that are not over. max_total_bytes: files and results of everybody together. in_flight: lines of all
    batches that a model has at once; the others wait on disk. keep_seconds: how long results, and the records
    of batches that are over, are kept.
    """

    directory: str = ""
    max_file_bytes: Annotated[int, Meta(ge=1024, le=1 << 40)] = 200 << 20
    max_line_bytes: Annotated[int, Meta(ge=64, le=1 << 30)] = 1 << 20
    max_lines: Annotated[int, Meta(ge=1, le=1 << 24)] = 50_000
    max_files: Annotated[int, Meta(ge=1, le=1 << 20)] = 1000
    max_batches: Annotated[int, Meta(ge=1, le=1 << 16)] = 100
    max_total_bytes: Annotated[int, Meta(ge=1024, le=1 << 50)] = 10 << 30
    in_flight: Annotated[int, Meta(ge=1, le=4096)] = 32
    keep_seconds: Annotated[float, Meta(ge=60, le=31_536_000)] = 30 * 86400.0

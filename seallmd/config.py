"""Reads `seallmd.toml`.

Owns the file's shape, its defaults, and errors that say file and line. Must not know what the settings lead
to: the tables of `core` and `api` are their own structs. Every field refuses what it does not know.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seallmd.api.settings import BatchSettings, HttpSettings, TierSettings
from seallmd.core.settings import GroupSettings, PolicySettings, ReplacementSettings, ServiceSettings
from seallmd.errors import ConfigError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)\s*$")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TABLE = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_-]+)\s*\]\]?")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+)\s*=")
_BLOCK_UNIT = 256  # weights begin at multiples of it, in host images and so in blocks
# Names of files and directories, beside the models'; table and field.
_FILES = (
    *(("http", key) for key in ("socket", "keys", "tls_certificate", "tls_key")),
    *(("batches", "directory"), ("control", "socket"), ("devices", "cache"), ("journal", "path")),
)


class Size(str):
    """A number of bytes as people write it: "2 GiB", "512 KiB"; empty = the default."""

    @property
    def bytes_(self) -> int:
        """The number; 0 when empty."""
        match = _SIZE.match(self)
        return int(float(match[1]) * _UNITS[match[2]]) if match else 0


class ControlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[control]` table.

    socket: path of the control socket; empty = the user's default. group: a group whose members may use it
    too; empty = this user and root alone.
    """

    socket: str = ""
    group: str = ""


class DeviceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[devices]` table.

    kind: "cuda" = every GPU, "cpu" = worker processes with a byte budget, "auto" = GPUs if there are any.
    cpu_workers: how many CPU devices. memory: arena of each CPU device; empty = a quarter of the machine's
    memory shared among them, at most 4 GiB each. reserve: GPU memory kept out of the arena, for
    activations and CUDA itself. graphs: GPU memory kept out besides, for CUDA graphs of steps; "0
    B" = none are captured. kernels: "triton" = each Triton operation that agrees with plain torch on a
    GPU, and FlashAttention 3 where it is installed and quicker, "torch" = none. threads: math threads of
    each CPU device; 0 = the cores shared among them. lend_threads: whether CPU devices that have nothing to
    do lend theirs to the others. block: the arena's unit; empty = 2 MiB on GPUs, 512 KiB on CPUs.
    host_memory: limit for host images of models; empty = half of the machine's memory. host_kv: host memory
    of each device for the KV of preempted requests; empty = 4 GiB for a GPU, a quarter of its arena for a
    CPU device. kv_layout: whether a block holds all layers of its tokens ("merged") or one ("split").
    cache: where downloaded and converted models are kept; empty = ~/.cache/seallmd. image_cache: limit for
    host images on disk, in the cache, from which a restart on CPU devices takes them; "0 B" = none.
    """

    kind: Literal["auto", "cuda", "cpu"] = "auto"
    cpu_workers: Annotated[int, Meta(ge=1, le=64)] = 2
    memory: str = ""
    reserve: str = "2 GiB"
    graphs: str = "512 MiB"
    kernels: Literal["triton", "torch"] = "triton"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    lend_threads: bool = True
    block: str = ""
    host_memory: str = ""
    host_kv: str = ""
    kv_layout: Literal["merged", "split"] = "merged"
    cache: str = ""
    image_cache: str = "8 GiB"


class JournalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[journal]` table: what happened, for `tools/replay.py`.

    path: empty = none. limit: size of the file at which recording stops. flight: memory for the last minutes,
    which are written to the cache directory when the node fails, or on SIGUSR1; "0 B" = none.
    """

    path: str = ""
    limit: str = "64 MiB"
    flight: str = "16 MiB"


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[log]` table.

    level: "info" has a line per request. format: "text", or "json" with an object a line. stall_seconds: when
    the event loop stands still for longer, the log says where it was.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    stall_seconds: Annotated[float, Meta(ge=0.05, le=3600)] = 1.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file.

    stop_seconds: how long requests in flight may take when the daemon is told to stop. hung_seconds: how long
    a worker may be silent while it owes the answer to a step or a copy, before it is killed and restarted.
    restart_seconds: the longest pause before a process that keeps dying is started again.
    """

    http: HttpSettings = HttpSettings()
    batches: BatchSettings = BatchSettings()
    control: ControlSettings = ControlSettings()
    devices: DeviceSettings = DeviceSettings()
    policy: PolicySettings = PolicySettings()
    replacement: ReplacementSettings = ReplacementSettings()
    journal: JournalSettings = JournalSettings()
    log: LogSettings = LogSettings()
    service: tuple[ServiceSettings, ...] = ()
    group: tuple[GroupSettings, ...] = ()
    tier: tuple[TierSettings, ...] = ()
    stop_seconds: Annotated[float, Meta(ge=0, le=86400)] = 30.0
    hung_seconds: Annotated[float, Meta(ge=0.5, le=86400)] = 120.0
    restart_seconds: Annotated[float, Meta(ge=0.5, le=3600)] = 30.0


# What a running daemon can change: services, groups, and these. All else is built into processes, arenas and
# sockets at the start; so is the depth of pipelines, and "dedicated" deals devices out once and for all.
LIVE = (
    *("stop_seconds", "hung_seconds", "log.level", "log.format", "http.keys"),
    *(f"policy.{field}" for field in PolicySettings.__struct_fields__ if field != "pipeline_depth"),
    *(f"replacement.{field}" for field in ReplacementSettings.__struct_fields__),
)


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises ConfigError whose message begins with `file:line:`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}:{_toml_line(error, text)}: {error}") from error
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        raise ConfigError(f"{path}:{_line_of(text, place, message)}: {message} {place}".rstrip()) from error
    _check(config, path, text)
    try:
        services = tuple(_with_place(service, path.parent) for service in config.service)
        return msgspec.structs.replace(_with_files(config, path.parent), service=services)
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}") from error


def reloaded(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """What a running daemon makes of a changed file: the configuration it runs with from now on, the settings
    that have changed with that, and those that wait for a restart (both by name, such as "log.level")."""
    config = _with_live(old, new)
    return config, _differences(old, config), _differences(config, new)


def _with_live(old: Config, new: Config) -> Config:
    """The old configuration with what a running daemon takes over of a new one."""
    live = [name for name in LIVE if not (name == "policy.scheduler" and _deals_out(old) != _deals_out(new))]
    changes: dict[str, Any] = {"service": new.service, "group": new.group}
    for name in live:
        table, _, key = name.partition(".")
        if key:
            before = changes.get(table, getattr(old, table))
            changes[table] = msgspec.structs.replace(before, **{key: getattr(getattr(new, table), key)})
        else:
            changes[table] = getattr(new, table)
    return msgspec.structs.replace(old, **changes)


def _deals_out(config: Config) -> bool:
    return config.policy.scheduler == "dedicated"


def _differences(old: Config, new: Config) -> list[str]:
    """Names of the settings that differ; a service counts as one."""
    found = []
    for table in Config.__struct_fields__:
        before, after = getattr(old, table), getattr(new, table)
        if table == "service":
            services = [{service.name: service for service in side} for side in (before, after)]
            names = dict.fromkeys([*services[0], *services[1]])
            found += [f"service {n}" for n in names if services[0].get(n) != services[1].get(n)]
        elif isinstance(before, msgspec.Struct):
            keys = before.__struct_fields__
            found += [f"{table}.{key}" for key in keys if getattr(before, key) != getattr(after, key)]
        elif before != after:
            found.append(table)
    return found


def _check(config: Config, path: Path, text: str) -> None:
    """What the types cannot say."""
    if not config.service:
        raise ConfigError(f"{path}: no [[service]] table: there is nothing to serve")
    names = [service.name for service in config.service]
    for index, name in enumerate(names):
        if name in names[:index]:
            line = _line_of(text, f"`$.service[{index}].name`", "")
            raise ConfigError(f"{path}:{line}: the name {name!r} is used twice")
    tiers = [tier.name for tier in config.tier]
    for index, name in enumerate(tiers):
        if name in tiers[:index]:
            line = _line_of(text, f"`$.tier[{index}].name`", "")
            raise ConfigError(f"{path}:{line}: the tier {name!r} is there twice")
    for index, group in enumerate(config.group):
        if unknown := sorted(set(group.services) - set(names)):
            line = _line_of(text, f"`$.group[{index}].services`", "")
            raise ConfigError(f"{path}:{line}: the group names {unknown[0]!r}, which is no service")
    for index, service in enumerate(config.service):
        if wrong := _wrong_groups(service):
            line = _line_of(text, f"`$.service[{index}].devices`", "")
            raise ConfigError(f"{path}:{line}: {wrong}")
    devices = config.devices
    for key in ("memory", "reserve", "graphs", "block", "host_memory", "host_kv", "image_cache"):
        _check_size(getattr(devices, key), f"`$.devices.{key}`", path, text)
    for key in ("limit", "flight"):
        _check_size(getattr(config.journal, key), f"`$.journal.{key}`", path, text)
    block = Size(devices.block).bytes_
    if devices.block and (not 4096 <= block <= 1 << 30 or block % _BLOCK_UNIT):
        line = _line_of(text, "`$.devices.block`", "")
        raise ConfigError(
            f"{path}:{line}: a block has 4 KiB to 1 GiB, a multiple of {_BLOCK_UNIT} B, not {devices.block}"
        )


def _wrong_groups(service: ServiceSettings) -> str:
    """What is wrong with the groups of devices that a service may come in on."""
    for group in service.devices:
        if len(group) != (service.tensor_parallel or 1):
            return f"{list(group)} is not a group of tensor_parallel = {service.tensor_parallel or 1} devices"
        if len(set(group)) < len(group) or min(group) < 0:
            return f"{list(group)} is not a group of different devices"
    return ""


def _check_size(value: str, place: str, path: Path, text: str) -> None:
    if value and not _SIZE.match(value):
        line = _line_of(text, place, "")
        raise ConfigError(f'{path}:{line}: {value!r} is no size; write for instance "2 GiB" or "512 KiB"')


def _with_place(service: ServiceSettings, base: Path) -> ServiceSettings:
    """Make a path absolute, relative to the configuration file; leave a Hugging Face id as it is."""
    model = _expanded(service.model)
    here = base / model
    is_path = model.is_absolute() or service.model.startswith((".", "~")) or service.model.endswith(".gguf")
    # A missing directory beside others is a missing model, not something to look for on the internet.
    if is_path or os.path.exists(here) or (len(model.parts) > 1 and os.path.isdir(here.parent)):
        return msgspec.structs.replace(service, model=str(here.absolute()))
    return service


def _with_files(config: Config, base: Path) -> Config:
    """Names of files made absolute, relative to the configuration file as models are."""
    changes: dict[str, Any] = {}
    for table, key in _FILES:
        before = changes.get(table, getattr(config, table))
        if name := getattr(before, key):
            place = str((base / _expanded(name)).absolute())
            changes[table] = msgspec.structs.replace(before, **{key: place})
    return msgspec.structs.replace(config, **changes)


def _expanded(name: str) -> Path:
    """With what ~ and ~user stand for. Raises RuntimeError for a user without a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise RuntimeError(f"{name}: there is no such home directory") from None


def _toml_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    found = re.search(r"line (\d+)", str(error))
    return int(found[1]) if found else len(text.splitlines())  # "at end of document"


def _line_of(text: str, place: str, message: str) -> int:
    """The line of a place such as `$.service[1].dtype`; of its table when the key is not there."""
    parts = re.findall(r"[A-Za-z0-9_-]+|\[\d+\]", place.replace("$", ""))
    unknown = re.search(r"unknown field `([^`]+)`", message)
    key = unknown[1] if unknown else None
    table = parts[0] if parts else None
    index = int(parts[1][1:-1]) if len(parts) > 1 and parts[1].startswith("[") else None
    names = [part for part in parts[1:] if not part.startswith("[")]
    if key is None and names:
        key = names[0]
    if key is None and index is None:
        key, table = table, None
    return _scan(text, table, index, key)


def _scan(text: str, table: str | None, index: int | None, key: str | None) -> int:
    current, count, best = None, -1, 1
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            current = match[2]
            count += current == table and match[1] == "[["
            here = current == table and (index is None or count == index)
            if here or (table is None and current == key):
                best = number
        elif (match := _KEY.match(line)) and current == table and match[1] == key and index in (None, count):
            return number
    return best

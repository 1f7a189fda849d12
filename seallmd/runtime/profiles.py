"""Keeps what was learnt of services between runs of the daemon.

Owns the file (JSON, in the cache directory, replaced atomically). Must not know what a profile means.
A profile counts only for the same model, dtype and kind of device; a file that cannot be read is as good as
none, since everything in it can be learnt again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from seallmd.core.profile import ServiceProfile
from seallmd.core.settings import ServiceSettings
from seallmd.files import write_whole

log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    model: str
    dtype: str
    device: str
    profile: ServiceProfile


def load(path: Path, services: Iterable[ServiceSettings], device: str) -> dict[str, ServiceProfile]:
    """The profiles that fit these services on this kind of device."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, _Entry])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("the profiles of earlier runs cannot be read: %s", error)
        return {}
    found = {}
    for service in services:
        entry = entries.get(service.name)
        if entry is not None and (entry.model, entry.dtype, entry.device) == _identity(service, device):
            found[service.name] = entry.profile
    return found


def save(
    path: Path, services: Iterable[ServiceSettings], device: str, profiles: dict[str, ServiceProfile]
) -> None:
    """Write the profiles of services that had requests. A failure is logged: nothing depends on the file."""
    entries = {
        service.name: _Entry(*_identity(service, device), profiles[service.name])
        for service in services
        if service.name in profiles and profiles[service.name].requests
    }
    if not entries:
        return
    try:
        write_whole(path, [msgspec.json.format(msgspec.json.encode(entries))])
    except OSError as error:
        log.warning("what was learnt of services cannot be kept: %s", error)


def _identity(service: ServiceSettings, device: str) -> tuple[str, str, str]:
    return service.model, service.dtype, device

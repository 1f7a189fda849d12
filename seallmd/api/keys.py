"""API keys: who calls, and what that key is allowed.

Owns the file of keys, the check of a presented key, and the request's own key (a context variable, because
it concerns whatever a handler does). Must not know routes, nor count anything (`rates`).

The file is TOML, readable for its owner (and group) alone:

    [[key]]
    name = "alice"
    key = "sk-..."                 # or sha256 = "..." of it, so that the file holds no secret
    tier = "priority"
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from seallmd.errors import ConfigError

CREDENTIAL = "api-keys"  # name of the systemd credential
LEAST_CHARACTERS = 16  # of a key: shorter ones can be guessed

KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[key]]` table.

    name: in logs and metrics; never the key itself. key: the secret itself. sha256: or, instead of it, its
    digest in hexadecimal. tier: of its requests. models: patterns of the services that it may use, such as
    "llama-*"; empty = every one. requests_per_minute, tokens_per_minute: limits, tokens of prompt and output
    together; 0 = none. max_requests: so many at a time; 0 = any number. admin: it may operate the daemon from
    the page.
    """

    name: KeyName
    key: str = ""
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-fA-F]{64})?$")] = ""
    tier: Literal["priority", "default", "flex"] = "default"
    models: tuple[str, ...] = ()
    requests_per_minute: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    max_requests: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    admin: bool = False

    def allows(self, model: str) -> bool:
        """Whether the key may use a model; what it may not use is not there for it."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: tuple[Key, ...] = ()


class Keyring:
    """The keys that hold now. None at all: everybody may do everything."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.replace(keys)

    def replace(self, keys: Sequence[Key]) -> None:
        """From here on these hold, for whoever comes next."""
        self._keys = [(_digest(key), key) for key in keys]

    @property
    def required(self) -> bool:
        """Whether there is anybody to be told from others."""
        return bool(self._keys)

    def find(self, presented: str) -> Key | None:
        """Whose key this is. All are compared, in time that tells nothing."""
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        """The key of a name, for work that goes on without its caller."""
        return next((key for _, key in self._keys if key.name == name), None)


# Whose request is being handled; None = nobody has to say.
current_key: ContextVar[Key | None] = ContextVar("current_key", default=None)


def locate_keys(configured: str, environment: Mapping[str, str]) -> Path | None:
    """The file of keys: as configured, else systemd's credential, else none."""
    if configured:
        return Path(configured)
    directory = environment.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory) / CREDENTIAL if directory else None
    return credential if credential is not None and credential.exists() else None


def read_keys(path: Path | None) -> tuple[Key, ...]:
    """The keys of a file. Raises ConfigError, whose message holds no key."""
    if path is None:
        return ()
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                raise ConfigError(f"{path}: others may read or write it; chmod o= {path}")
            text = file.read().decode()
        keys = msgspec.convert(tomllib.loads(text), _File).key
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    _check(keys, path)
    return keys


def _check(keys: Sequence[Key], path: Path) -> None:
    """What the types cannot say."""
    if not keys:
        raise ConfigError(f"{path}: no [[key]] table: nobody could call")
    for key in keys:
        if bool(key.key) == bool(key.sha256):
            raise ConfigError(f"{path}: {key.name} needs either key or sha256")
        if key.key and len(key.key) < LEAST_CHARACTERS:
            raise ConfigError(f"{path}: the key of {key.name} has fewer than {LEAST_CHARACTERS} characters")
    for what, seen in (("name", [k.name for k in keys]), ("key", [_digest(k) for k in keys])):
        if len(set(seen)) < len(seen):
            raise ConfigError(f"{path}: a {what} is used twice")


def _digest(key: Key) -> bytes:
    return bytes.fromhex(key.sha256) if key.sha256 else hashlib.sha256(key.key.encode()).digest()

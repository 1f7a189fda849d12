"""Types of body fields, and reading a JSON body into a struct.

Owns what every endpoint's schema is made of: ranges, and errors that name the field at fault. Must not know
any endpoint, aiohttp or the engine.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from seallmd.errors import RequestError

MAX_ERROR_CHARACTERS = 300

TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 31)]
Top = Annotated[int, Meta(ge=0, le=20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Salt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")]
ServiceTier = Literal["auto", "default", "flex", "priority"]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]

# Known but not served: field names, each with the JSON values that change nothing.
Unserved = dict[str, tuple[str, ...]]

Struct = TypeVar("Struct")
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


def decode_body(body: bytes, kind: type[Struct]) -> Struct:
    """A JSON body as a struct. Raises RequestError, with the field at fault in `param`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from None


def refuse_unserved(fields: dict[str, msgspec.Raw], unserved: Unserved) -> None:
    """Refuse fields that are known but not served, unless their JSON value changes nothing."""
    for name in sorted(fields.keys() & unserved.keys()):
        try:
            value = msgspec.json.format(bytes(fields[name]), indent=-1).decode()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # it was skipped until now
            raise _no_json(error) from None
        if value not in unserved[name]:
            raise RequestError(f"`{name}` is not supported", code="unsupported_parameter", param=name)


def _no_json(error: Exception) -> RequestError:
    return RequestError(f"the body is not valid JSON: {error}"[:MAX_ERROR_CHARACTERS])


def _explain(error: msgspec.ValidationError) -> RequestError:
    """msgspec's text names the place as a path, which is OpenAI's `param`."""
    text = str(error)
    place = _PATH.search(text)
    if place is None:
        missing = re.search(r"missing required field `(\w+)`", text)
        return RequestError(text[:MAX_ERROR_CHARACTERS], param=missing.group(1) if missing else None)
    param = place.group(1).removesuffix("[...]")[:100]
    reason = text[: place.start()]
    return RequestError(f"`{param}`: {reason}"[:MAX_ERROR_CHARACTERS], param=param or None)

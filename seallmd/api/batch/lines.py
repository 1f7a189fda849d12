"""Reads the input of a batch: one request a line, all of them examined before the first is run.

Owns the form of a line and what is said of a wrong one, with its number. Must not know how lines are run, nor
which models there are. Blocks; what it holds in memory is one line, and a few words of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from seallmd.api.batch.batches import Line
from seallmd.api.batch.records import LineError
from seallmd.api.fields import decode_body
from seallmd.api.settings import BatchSettings
from seallmd.errors import RequestError

MAX_ERRORS = 50  # that are told of one file
_MAX_ID = 256


class LineBody(msgspec.Struct, frozen=True):
    """A request of a batch. body: as the endpoint takes it."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Model(msgspec.Struct, frozen=True):
    model: str


class Examined(msgspec.Struct):
    """What was found in an input. models: the line that names each first."""

    lines: list[Line]
    errors: list[LineError]
    models: dict[str, int]


def examine(path: Path, endpoint: str, settings: BatchSettings) -> Examined:
    """Read a whole input. Raises OSError when it cannot be read."""
    found, ids = Examined([], [], {}), dict[str, int]()
    for number, start, raw in _raw_lines(path, settings.max_line_bytes):
        if len(found.errors) >= MAX_ERRORS:
            return found
        if not raw.strip():
            continue
        if len(found.lines) >= settings.max_lines:
            message = f"a batch may have {settings.max_lines} lines"
            found.errors.append(LineError("too_many_lines", message, number))
            return found
        try:
            line = _examined(raw, number, start, endpoint, settings)
            if line.custom_id in ids:
                message = f"`custom_id` {line.custom_id[:64]!r} is that of line {ids[line.custom_id]} already"
                raise RequestError(message, code="duplicate_custom_id", param="custom_id")
        except RequestError as error:
            found.errors.append(LineError(error.code or "invalid_request", str(error), number, error.param))
            continue
        ids[line.custom_id] = number
        found.models.setdefault(line.model, number)
        found.lines.append(line)
    if not found.lines and not found.errors:
        found.errors.append(LineError("empty_file", "the file has no requests"))
    return found


def _raw_lines(path: Path, most: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of each line; of one that is too long, no more than shows that it is."""
    with path.open("rb") as file:
        number = start = 0
        while raw := file.readline(most + 2):
            number += 1
            length = len(raw)
            while not raw.endswith(b"\n") and (rest := file.readline(1 << 20)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, start, raw
            start += length


def _examined(raw: bytes, number: int, start: int, endpoint: str, settings: BatchSettings) -> Line:
    """Raises RequestError."""
    if len(raw.rstrip(b"\r\n")) > settings.max_line_bytes:
        raise RequestError(f"a line may have {settings.max_line_bytes} bytes", code="line_too_long")
    try:
        line = decode_body(raw, LineBody)
    except RequestError as error:
        code = "missing_required_parameter" if error.param else "invalid_json_line"
        message = str(error).replace("the body is not", "this line is not")
        raise RequestError(message, code=code, param=error.param) from None
    if not 0 < len(line.custom_id) <= _MAX_ID:
        message = f"`custom_id` has 1 to {_MAX_ID} characters"
        raise RequestError(message, code="invalid_custom_id", param="custom_id")
    if line.method != "POST":
        raise RequestError("`method` must be POST", code="invalid_method", param="method")
    if line.url != endpoint:
        message = f"`url` is {line.url[:64]!r}, but the batch is for {endpoint}"
        raise RequestError(message, code="mismatched_url", param="url")
    try:
        model = decode_body(bytes(line.body), _Model).model
    except RequestError as error:
        raise RequestError(f"`body`: {error}", code="invalid_body", param="body") from None
    return Line(number, line.custom_id, model, start, len(raw))

"""The daemon's log: how a record becomes a line, and the one line that every request gets.

Owns formats (text for people, JSON for programs, priorities for the journal) and the request's record. Must
not know where the facts come from. Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from seallmd.config import LogSettings
from seallmd.core.events import Finish

_REQUESTS = logging.getLogger("seallmd.request")

Fields = dict[str, Any]

# syslog's numbers, as the journal reads them at the start of a line
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def set_up(settings: LogSettings, environment: Mapping[str, str]) -> None:
    """Log to stderr from now on, as the settings say; may be called again when they change."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(settings, environment))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())


def _formatter(settings: LogSettings, environment: Mapping[str, str]) -> logging.Formatter:
    if settings.format == "json":
        return JsonFormatter()
    return TextFormatter(journal=_is_journal(environment.get("JOURNAL_STREAM", "")))


def _is_journal(stream: str) -> bool:
    """Whether stderr is the journal: it is when it is the very file that systemd names (systemd.exec(5))."""
    try:
        entry = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return stream == f"{entry.st_dev}:{entry.st_ino}"


class TextFormatter(logging.Formatter):
    """`time LEVEL message key=value ...`. journal: the journal adds the time and wants a priority instead."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it a traceback if there is one."""
        text = super().format(record)
        if not self._journal:
            return text
        priority = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(priority + line for line in text.splitlines())

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The message and its fields; whatever a message contains, it cannot pretend to be another line."""
        fields = " ".join(f"{key}={_plain(value)}" for key, value in _fields(record).items())
        record.message = " ".join(part for part in (_visible(record.message), fields) if part)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (seconds since 1970), level, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, traceback included."""
        line: Fields = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def fields(**values: object) -> dict[str, Fields]:
    """For `extra=`: what a line says beside its message; None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def _fields(record: logging.LogRecord) -> Fields:
    found: Fields = getattr(record, "fields", {})
    return found


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: object) -> str:
    """A value of a text line; quoted when it would not end where it ends."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text and all(c.isprintable() and c not in ' "=' for c in text) else repr(text)


@dataclass
class RequestRecord:
    """What is logged of one request. Times are seconds on the caller's clock; 0 = not yet.

    prompt, cached, output: tokens. cached: of the prompt, what had not to be computed again.
    """

    request: int
    service: str
    prompt: int
    arrived: float
    tier: str = "default"
    first: float = 0.0
    cached: int = 0
    output: int = 0

    def emitted(self, tokens: int, cached: int, now: float) -> None:
        """Tokens came."""
        self.first = self.first or now
        self.cached = cached or self.cached
        self.output += tokens

    def summary(self, finish: Finish, now: float) -> str:
        """Its end in a sentence."""
        why = f" ({finish.error})" if finish.error else ""
        tokens = f"{self.prompt} + {self.output} tokens"
        return f"request {self.request} ended: {finish.reason}{why}, {tokens} in {now - self.arrived:.2f} s"

    def finished(self, finish: Finish, now: float) -> None:
        """Write the line."""
        if not _REQUESTS.isEnabledFor(logging.INFO):
            return
        extra = fields(
            id=self.request,
            service=self.service,
            outcome=finish.reason,
            tier=None if self.tier == "default" else self.tier,
            prompt=self.prompt,
            cached=self.cached,
            output=self.output,
            first_seconds=round(self.first - self.arrived, 6) if self.first else None,
            seconds=round(now - self.arrived, 6),
            code=finish.code or None,
            error=finish.error or None,
        )
        _REQUESTS.info("request", extra=extra)

"""A record becomes one honest line; a request becomes one record."""

from __future__ import annotations

import io
import json
import logging

import pytest

from seallmd.config import LogSettings
from seallmd.core.events import Finish
from seallmd.runtime.log import JsonFormatter, RequestRecord, TextFormatter, fields, set_up


def record(message: str, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    """As logging makes one."""
    return logging.getLogger("test").makeRecord(
        "test", level, "f", 1, message, (), None, extra=fields(**more)
    )


def test_text_is_one_line_whatever_is_in_it() -> None:
    """A client's or a model's text cannot write a second, false line."""
    line = TextFormatter().format(record("a\nERROR b", error='say "no" c=d\n', seconds=1.0, n=3))
    assert "\n" not in line
    assert line.endswith("""INFO a\\nERROR b error='say "no" c=d\\n' seconds=1.000 n=3""")


def test_the_journal_gets_priorities() -> None:
    """Of every line, or a traceback would count as information."""
    entry = record("x", logging.ERROR)
    try:
        raise ValueError("inner")
    except ValueError as error:
        entry.exc_info = (type(error), error, error.__traceback__)
    lines = TextFormatter(journal=True).format(entry).splitlines()
    assert lines[0] == "<3>x"
    assert all(line.startswith("<3>") for line in lines)
    assert lines[-1] == "<3>ValueError: inner"


def test_json_has_the_fields_beside_the_message() -> None:
    """Numbers stay numbers."""
    line = JsonFormatter().format(record("a\nb", n=3, nothing=None))
    found = json.loads(line)
    assert found.pop("time") > 0
    assert found == {"level": "info", "message": "a\nb", "n": 3}
    assert "\n" not in line


def test_setting_up_again_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload that changes level and format takes effect, and lines do not come twice."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    set_up(LogSettings(level="warning"), {})
    logging.info("unseen")
    set_up(LogSettings(format="json"), {})
    logging.info("seen")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["seen"]


def test_a_request_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    """Times from its arrival; what failed says why."""
    caplog.set_level(logging.INFO)
    good = RequestRecord(7, "a", prompt=12, arrived=100.0)
    good.emitted(1, 8, 100.5)
    good.emitted(2, 0, 101.0)
    good.finished(Finish(7, "length"), 102.0)
    bad = RequestRecord(8, "a", prompt=3, arrived=1.0)
    bad.finished(Finish(8, "failed", "no room", "overloaded", 503), 1.25)
    one, two = (entry.fields for entry in caplog.records)  # type: ignore[attr-defined]
    assert one == {
        "id": 7,
        "service": "a",
        "outcome": "length",
        "prompt": 12,
        "cached": 8,
        "output": 3,
        "first_seconds": 0.5,
        "seconds": 2.0,
    }
    assert two == {
        "id": 8,
        "service": "a",
        "outcome": "failed",
        "prompt": 3,
        "cached": 0,
        "output": 0,
        "seconds": 0.25,
        "code": "overloaded",
        "error": "no room",
    }

"""Reads tool calls out of a text while it is being written.

Owns the state of one choice's text: what is said, which call is open, how far its arguments were told. Must
not know requests or responses. What looks like a call and turns out to be none is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from typing import Any

import msgspec

from seallmd.api.tool_formats import ToolFormat

_NAME = r'"name"\s*:\s*"([A-Za-z0-9_.-]{1,256})"'
_HEAD = re.compile(r"\{\s*" + _NAME + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BARE_NAME = re.compile(r"([A-Za-z0-9_.-]{1,256})(?:\[ARGS\])?(?=\{)")
_MAYBE_BARE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}(?:\[[ARGS]{0,4}\]?)?")
_SPACE = " \t\r\n"
_BETWEEN = _SPACE + ",;[]"
_ALPHABET = string.ascii_letters + string.digits


class Said(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Called(msgspec.Struct, frozen=True):
    """A call begins; calls of one choice are counted by `index`."""

    index: int
    id: str
    name: str


class Argued(msgspec.Struct, frozen=True):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Said | Called | Argued


class _Object:
    """Finds the end of a JSON object whose text comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        """depth: braces that are open already."""
        self._depth = depth
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """Where in the next piece the object ends (behind its brace); None when it goes on."""
        for at, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


class ToolReader:
    """One choice. `push` its text, then `flush`. calls: how many were begun."""

    def __init__(self, format_: ToolFormat, *, several: bool = True) -> None:
        """several: calls behind the first count; otherwise nothing behind it does."""
        self._format, self._several = format_, several
        self.calls = 0
        self._text = ""  # not understood yet
        self._tried = ""  # what a call began with, should it be none
        self._state = self._before if not format_.begin else self._saying
        self._object = _Object()
        self._seen = 0  # characters of _text that _object has seen
        self._wrapped = False  # the arguments at hand are in an object of their own

    def push(self, text: str) -> list[Event]:
        """What this text adds."""
        self._text += text
        events = list[Event]()
        while True:
            state, before = self._state, len(self._text)
            if not state(events) and (self._state == state and len(self._text) == before):
                return events

    def flush(self) -> list[Event]:
        """What was held back, when no more text comes."""
        events = list[Event]()
        unnamed = self._state == self._naming or (self._state == self._opening and self._tried)
        if unnamed or self._state in (self._saying, self._before):
            self._say(events, self._tried + self._text)
        self._text = self._tried = ""
        return events

    # ----------------------------------------------------------------- states: each takes what it understands

    def _before(self, _events: list[Event]) -> bool:
        """At the start of an output that is either calls or text."""
        text = self._text.lstrip()
        optional = self._format.optional
        if optional and text.startswith(optional):
            text = text[len(optional) :].lstrip()
        elif optional.startswith(text):
            return False
        if not text:
            return False
        if text[0] != "{":
            self._state = self._saying
            return True
        self._tried = self._text[: len(self._text) - len(text)]
        self._text, self._state = text, self._opening
        return True

    def _saying(self, events: list[Event]) -> bool:
        begin = self._format.begin
        at = self._text.find(begin) if begin else -1
        if at >= 0:
            said = self._text[:at].rstrip()  # white space around calls is no text
            self._say(events, said)
            self._tried = self._text[len(said) : at + len(begin)]
            self._text, self._state = self._text[at + len(begin) :], self._opening
            return True
        longest = min(len(begin) - 1, len(self._text))
        held = next((n for n in range(longest, 0, -1) if begin.startswith(self._text[-n:])), 0)
        said = self._text[: len(self._text) - held]
        said = said.rstrip() if begin else said
        self._say(events, said)
        self._text = self._text[len(said) :]
        return False

    def _opening(self, events: list[Event]) -> bool:
        """Behind a marker, or behind a call: another call, its end, or text again."""
        begin, end = self._format.begin, "</tool_call>"
        text = self._text.lstrip(_BETWEEN)
        if begin and (marker := self._text.lstrip(_SPACE)):
            if marker.startswith(begin):
                self._text, self._tried = marker[len(begin) :], self._tried + begin
                return True
            if begin.startswith(marker):
                return False
        if not text or end.startswith(text):
            return False
        if text.startswith(end):
            self._text, self._tried, self._state = text[len(end) :], "", self._saying
            return True
        if text[0] == "{":
            self._object, self._seen = _Object(), 0
            self._text, self._state = text, self._naming
            return True
        if self._tried and begin == "[TOOL_CALLS]":
            if (name := _BARE_NAME.match(text)) is not None:
                self._call(events, name.group(1))
                self._text, self._wrapped = text[name.end() :], False
                return True
            if _MAYBE_BARE_NAME.fullmatch(text):
                return False
        self._say(events, self._tried)  # a marker without a call
        self._tried, self._state = "", self._saying
        return True

    def _naming(self, events: list[Event]) -> bool:
        """In a call's object, before its name is known."""
        head = _HEAD.match(self._text)
        if head is not None:
            self._call(events, head.group(1))
            self._text, self._wrapped = self._text[head.end() :], True
            return True
        end = self._object.end(self._text[self._seen :])
        if end is None:
            self._seen = len(self._text)
            return False
        end += self._seen
        whole, self._text = self._text[:end], self._text[end:]
        if not self._take_whole(events, whole):
            self._say(events, self._tried + whole)
            self._tried, self._state = "", self._saying
            return True
        self._tried, self._state = "", self._opening
        return True

    def _arguing(self, events: list[Event]) -> bool:
        end = self._object.end(self._text)
        part = self._text if end is None else self._text[:end]
        if part:
            self._emit(events, Argued(self.calls - 1, part))
        self._text = self._text[len(part) :]
        if end is not None:
            self._state = self._closing if self._wrapped else self._opening
        return end is not None

    def _closing(self, _events: list[Event]) -> bool:
        """Behind the arguments: the end of the object around them, which some models forget."""
        text = self._text.lstrip(_SPACE)
        if not text:
            return False
        if text[0] == ",":
            self._text, self._object, self._state = text, _Object(depth=1), self._skipping
        else:
            self._text, self._state = text.removeprefix("}"), self._opening
        return True

    def _skipping(self, _events: list[Event]) -> bool:
        """In further keys, which mean nothing here."""
        end = self._object.end(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._state = self._opening
        return end is not None

    # ----------------------------------------------------------------------------------------------- deeds

    def _take_whole(self, events: list[Event], text: str) -> bool:
        """A call whose keys come in another order."""
        try:
            # Not Python's own: that takes NaN and halves of surrogate pairs, which no answer can hold.
            call = msgspec.json.decode(text, type=dict[str, Any])
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters")) or {}
            # Some models quote them.
            told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (msgspec.DecodeError, RecursionError):
            return False
        if not isinstance(name, str) or not name:
            return False
        self._call(events, name)
        self._emit(events, Argued(self.calls - 1, told))
        return True

    def _call(self, events: list[Event], name: str) -> None:
        self.calls += 1
        self._tried, self._object, self._state = "", _Object(), self._arguing
        size = self._format.id_characters
        id_ = "".join(secrets.choice(_ALPHABET) for _ in range(size)) or f"call_{secrets.token_hex(12)}"
        self._emit(events, Called(self.calls - 1, id_, name))

    def _say(self, events: list[Event], text: str) -> None:
        if text and (self._several or not self.calls):
            events.append(Said(text))

    def _emit(self, events: list[Event], event: Called | Argued) -> None:
        if self._several or event.index == 0:
            events.append(event)

"""What the pieces of assistants' turns mean: text, and calls of tools.

Owns a reader for each choice of a request. Must not know how answers are worded.
"""

from __future__ import annotations

from seallmd.api.choices import Piece
from seallmd.api.tool_formats import ToolFormat
from seallmd.api.tool_reader import Event, Said, ToolReader


class Turns:
    """The turns of all choices of one request."""

    def __init__(self, tools: ToolFormat | None, *, several: bool) -> None:
        """tools: how calls are written, None where none may be made. several: more than one may be made."""
        self._tools, self._several = tools, several
        self._readers: dict[int, ToolReader] = {}

    def events(self, piece: Piece) -> list[Event]:
        """What a piece's text means; the last piece of a choice flushes what was held back."""
        if self._tools is None:
            return [Said(piece.text)] if piece.text else []
        reader = self._readers.get(piece.index)
        if reader is None:
            reader = self._readers[piece.index] = ToolReader(self._tools, several=self._several)
        events = reader.push(piece.text)
        return events if piece.finish_reason is None else [*events, *reader.flush()]

    def reason(self, piece: Piece) -> str | None:
        """An output that stopped by itself after calls waits for their results."""
        reader = self._readers.get(piece.index)
        called = reader is not None and reader.calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason

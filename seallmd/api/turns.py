"""What the pieces of assistants' turns mean: thoughts, text, and calls of tools.

Owns the readers of each choice of a request. Must not know how answers are worded.
"""

from __future__ import annotations

import msgspec

from seallmd.api.choices import Piece
from seallmd.api.reasoning import TAGS, ReasoningReader
from seallmd.api.tool_formats import ToolFormat
from seallmd.api.tool_reader import Event, Said, ToolReader


class TurnFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How the turns of one request are written.

    tools: calls, None where none may be made. several: more than one may be. reasons: there may be thoughts
    before the answer. is_open: and the prompt has begun them.
    """

    tools: ToolFormat | None = None
    several: bool = True
    reasons: bool = False
    is_open: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must not be lost where they are special tokens."""
        return (*(TAGS if self.reasons else ()), *(() if self.tools is None else self.tools.markers))


class Thought(msgspec.Struct, frozen=True):
    """Text that comes before the answer."""

    text: str


TurnEvent = Thought | Event


class _Turn:
    """One choice's."""

    def __init__(self, format_: TurnFormat) -> None:
        self.reasoning = ReasoningReader(is_open=format_.is_open) if format_.reasons else None
        self.tools = None if format_.tools is None else ToolReader(format_.tools, several=format_.several)

    def events(self, piece: Piece) -> list[TurnEvent]:
        events, said = list[TurnEvent](), piece.text
        if self.reasoning is not None:
            thought, said = self.reasoning.push(piece.text, piece.offsets)
            if piece.finish_reason is not None:
                last = self.reasoning.flush()
                thought, said = thought + last[0], said + last[1]
            events += [Thought(thought)] if thought else []
        if self.tools is None:
            return [*events, Said(said)] if said else events
        events += self.tools.push(said)
        return events if piece.finish_reason is None else [*events, *self.tools.flush()]


class Turns:
    """The turns of all choices of one request."""

    def __init__(self, format_: TurnFormat) -> None:
        self._format = format_
        self._turns: dict[int, _Turn] = {}

    def events(self, piece: Piece) -> list[TurnEvent]:
        """What a piece's text means; the last piece of a choice flushes what was held back."""
        turn = self._turns.get(piece.index)
        if turn is None:
            turn = self._turns[piece.index] = _Turn(self._format)
        return turn.events(piece)

    def reason(self, piece: Piece) -> str | None:
        """An output that stopped by itself after calls waits for their results."""
        turn = self._turns.get(piece.index)
        called = turn is not None and turn.tools is not None and turn.tools.calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason

    @property
    def reasoning_tokens(self) -> int | None:
        """Of all choices so far; None where nothing is read as thoughts."""
        if not self._format.reasons:
            return None
        return sum(turn.reasoning.tokens for turn in self._turns.values() if turn.reasoning is not None)

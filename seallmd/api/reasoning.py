"""What a model thinks before it answers: found in a text while it is being written.

Owns the tags and the state of one choice's text: whether it is still being thought. Must not know requests,
responses or tool calls, which are looked for in the answer alone.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import Enum, auto

# As Qwen3, QwQ, DeepSeek-R1, its distillations and SmolLM3 write it.
BEGIN, END = "<think>", "</think>"
TAGS = (BEGIN, END)


def knows_reasoning(template: str) -> bool:
    """Whether a chat template is one of a model that thinks: some name the closing tag alone."""
    return BEGIN in template or END in template


def leaves_open(text: str) -> bool:
    """Whether a text ends in thoughts that its writer did not close."""
    return text.rfind(BEGIN) > text.rfind(END)


def thoughts_grammar(added: Callable[[str], int | None], *, is_open: bool) -> str:
    """A grammar (Lark, as llguidance extends it) of thoughts, and `@answer` behind them.

    added: the id of a token that a model's tokenizer was given by hand, None for other text. is_open: they
    have begun; otherwise there need not be any.
    """
    begin, end = (json.dumps(tag) if added(tag) is None else f"<[{added(tag)}]>" for tag in TAGS)
    start = "thoughts @answer" if is_open else f"({begin} thoughts)? @answer"
    if added(END) is None:  # text behind which nothing tells where thoughts end
        lines = ["thoughts: free space", f"free[suffix={end}]: /(?s:.*)/"]
    else:
        lines = [f"thoughts: free {end} space", "free: /(?s:.*)/"]
    return "\n".join([f"start: {start}", *lines, r"space: /\s{0,8}/"]) + "\n"


class _State(Enum):
    BEGINNING = auto()  # nothing was read that tells thoughts from an answer
    THINKING = auto()
    TURNING = auto()  # in the white space before the answer
    ANSWERING = auto()


class ReasoningReader:
    """One choice. `push` its text, then `flush`; both give what is new of thoughts and answer.

    Only what the text begins with are thoughts. White space around them belongs to neither.
    """

    def __init__(self, *, is_open: bool) -> None:
        """is_open: the prompt ends with the opening tag, as some templates write it for the model."""
        self._is_open = is_open
        self._state = _State.BEGINNING
        self._held = ""  # not understood yet
        self._thought = False  # something was, but for white space
        self._length = 0  # characters of all that was pushed
        self._end: int | None = None  # of the thoughts: the characters up to there, tags included
        self._offsets: list[int] = []  # of tokens that may be part of thoughts

    def push(self, text: str, offsets: Sequence[int] = ()) -> tuple[str, str]:
        """What this text adds. offsets: where in the choice's text each of its tokens begins."""
        self._length += len(text)
        self._held += text
        if self._end is None:
            self._offsets += offsets
        if self._state is _State.BEGINNING:
            self._begin()
        thought = self._think() if self._state is _State.THINKING else ""
        return thought, self._answer()

    def flush(self) -> tuple[str, str]:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        if self._state is _State.THINKING or (self._state is _State.BEGINNING and self._is_open):
            return self._told(held.rstrip()), ""
        return "", held if self._state is _State.BEGINNING else ""

    @property
    def tokens(self) -> int:
        """Tokens of the thoughts so far, tags included."""
        if self._end is not None:
            return bisect_left(self._offsets, self._end)
        return len(self._offsets) if self._state is _State.THINKING else 0

    def _begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(BEGIN):  # in spite of one in the prompt, too
            self._state, self._held = _State.THINKING, text.removeprefix(BEGIN)
        elif not BEGIN.startswith(text):
            self._state = _State.THINKING if self._is_open else _State.ANSWERING

    def _think(self) -> str:
        at = self._held.find(END)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(END) :]
            self._end = self._length - len(self._held)
            self._state = _State.TURNING
            return self._told(thought)
        longest = min(len(END) - 1, len(self._held))
        tag = next((n for n in range(longest, 0, -1) if END.startswith(self._held[-n:])), 0)
        thought = self._held[: len(self._held) - tag].rstrip()
        self._held = self._held[len(thought) :]
        return self._told(thought)

    def _told(self, thought: str) -> str:
        told = thought if self._thought else thought.lstrip()
        self._thought |= bool(told)
        return told

    def _answer(self) -> str:
        if self._state is _State.TURNING:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.ANSWERING
        if self._state is not _State.ANSWERING:
            return ""
        said, self._held = self._held, ""
        return said

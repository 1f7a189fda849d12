"""From token ids to text, piece by piece.

Owns incremental detokenization and stop strings. Must not know requests, HTTP or the engine. Both classes
give the same text however the tokens are grouped into calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_UNFINISHED = 3  # a UTF-8 character has at most four bytes, so at most three can be an unfinished one
_PRIME_TOKENS = 6
_MAX_PRIME_TOKENS = 96
_MAX_WINDOW = 24


class Detokenizer:
    """Text of one growing sequence of tokens; never gives half a character.

    Decodes a short window and gives out what is new at its end (the two-offset method of text-generation-
    inference and vLLM). `tokenizers.DecodeStream` works alike, but on an invalid byte it holds text back
    without bound, and what it holds when the tokens end is lost, finished characters included.

    The joined text is the decoding of all tokens, less the replacement characters (at most three) of a
    character that is unfinished at the end. One exception: tokenizers with byte fallback decode a run of
    byte tokens as a whole, so a valid character that was given out may have become invalid with hindsight.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip: frozenset[int] = frozenset()
    ) -> None:
        """prompt: what the tokens follow; it decides on leading spaces, which decoders strip at the start.

        skip: ids that have no place in the text (`special_ids`, or none).
        """
        self._tokenizer = tokenizer
        self._skip = skip
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were given out
        self._mark = 0  # the window up to here ended with a finished character
        self._prime(prompt)

    def push(self, token: int) -> str:
        """The text that this token completes, often but not always its own."""
        if self._is_silent(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            out = self._give(text, len(text))
            self._forget_before_mark()
            return out
        if len(self._window) - self._mark <= _MAX_UNFINISHED:
            return ""
        # More tokens than one character has bytes: some are invalid, only the very last may be unfinished.
        out = self._give(text, len(text) - 1)
        self._shorten_invalid_window()
        return out

    def flush(self) -> str:
        """What was held back, at the end of the tokens, without an unfinished character."""
        text = self._decode(self._window)
        return self._give(text, len(text) - _unfinished(text))

    def _is_silent(self, token: int) -> bool:
        """Ids without text stay out of the window: after an empty one, a decoder strips the next space."""
        return token in self._skip or self._tokenizer.id_to_token(token) is None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def _give(self, text: str, end: int) -> str:
        out = text[self._sent : end]
        self._sent = min(max(self._sent, end), len(text))
        return out

    def _prime(self, prompt: Sequence[int]) -> None:
        """Start the window with the prompt's end, long enough not to begin inside a character."""
        tail = [t for t in prompt[-_MAX_PRIME_TOKENS:] if not self._is_silent(t)]
        count = _PRIME_TOKENS
        text = self._decode(tail[-count:])
        while text.startswith(_REPLACEMENT) and count < len(tail):
            count *= 2
            text = self._decode(tail[-count:])
        self._window = tail[-count:]
        # A prompt given as ids may end inside a character: then that character is part of the output.
        self._sent = len(text) if text.startswith(_REPLACEMENT) else len(text) - _unfinished(text)
        self._mark = len(self._window) - (len(text) - self._sent)

    def _forget_before_mark(self) -> None:
        """All is given out: keep the tokens since the last such moment: they begin a character."""
        self._window = self._window[self._mark :]
        self._sent = len(self._decode(self._window))
        self._mark = len(self._window)

    def _shorten_invalid_window(self) -> None:
        """Keep enough tokens to hold an unfinished character; without this, garbage costs n squared."""
        if len(self._window) < _MAX_WINDOW:
            return
        self._window = self._window[-_MAX_UNFINISHED - 1 :]
        self._mark = 0
        self._sent = max(0, len(self._decode(self._window)) - 1)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the special tokens: the ones that `skip_special_tokens` leaves out of the text."""
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _unfinished(text: str) -> int:
    """How many replacement characters at the end may stand for an unfinished character."""
    tail = text[-_MAX_UNFINISHED:]
    return len(tail) - len(tail.rstrip(_REPLACEMENT))


class StopStrings:
    """Ends a text before (or after) the first of several strings, and holds back what might become one.

    The string that is complete first wins; of two that end together, the longer one. `stopped` tells whether
    one was found; nothing is given out after that.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """stops: non-empty strings. include: the string found is part of the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to give out now."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = self._first(text)
        if found is not None:
            start, end = found
            self.stopped, self._held = True, ""
            return text[: end if self._include else start]
        safe = len(text) - self._possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first."""
        places = [(text.find(stop), len(stop)) for stop in self._stops]
        spans = [(start + size, start) for start, size in places if start >= 0]
        if not spans:
            return None
        end, start = min(spans)
        return start, end

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for size in range(longest, 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

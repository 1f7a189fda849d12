"""The choices of one request while they are generated: tokens in, pieces of text out.

Owns one choice's end (stop ids, stop strings, limits), the merging of several choices, and the promise that
whatever a request started is cancelled when it is over. Must not know HTTP or the shape of responses.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

import msgspec

from seallmd.api.detokenize import Detokenizer, StopStrings
from seallmd.api.metrics import Metrics, RequestMeter
from seallmd.core.events import Finish
from seallmd.core.messages import Scores
from seallmd.errors import RequestError
from seallmd.runtime.face import EngineFace, Generation, TokenStream


class Piece(msgspec.Struct, frozen=True):
    """What is new of one choice. text may be empty. finish_reason: "stop" or "length" on the last one.

    offsets: where in the choice's text each token begins. scores: of the tokens, if they are wanted.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None = None
    offsets: list[int] = []
    scores: list[Scores] = []


class Choice:
    """One choice: cuts its text at stop strings and counts its tokens.

    Tokens are taken one by one, so the outcome does not depend on how they were grouped on their way. began,
    first_token: when (time.monotonic).
    """

    def __init__(
        self,
        index: int,
        generation: Generation,
        stream: TokenStream,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        silent: bool = False,
        leader: Choice | None = None,
    ) -> None:
        """leader: the first choice of the same prompt, if this is not it.

        silent: only the prompt is of interest; the one token that shows that it was run is dropped."""
        self.index = index
        self.prompt = generation.prompt
        self.stream = stream
        self.tokens = 0
        self.began = time.monotonic()
        self.first_token: float | None = None
        self.finish_reason: str | None = None
        self._leader = leader
        self._prompt_scores: list[Scores] = []
        self._scores: deque[Scores] = deque()
        self._silent = silent
        self._length = 0  # characters of all tokens so far
        self._stop_ids = frozenset(generation.stop_ids)
        self._min_tokens = generation.sampling.min_tokens
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, include=include_stop)
        self._include_stop = include_stop

    @property
    def prompt_scores(self) -> list[Scores]:
        """Of the prompt, which its first choice alone asks for; they are there before the first piece."""
        return (self._leader or self)._prompt_scores

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything of this choice, in order; the last piece has a finish_reason. Raises RequestError."""
        async for batch in self.stream.batches():
            piece = self._take(batch)
            yield piece
            if piece.finish_reason is not None:
                return
        assert self.stream.finish is not None
        yield self._end(self.stream.finish)

    def _take(self, batch: list[int]) -> Piece:
        text, taken = "", 0
        if self.first_token is None:
            self.first_token = time.monotonic()
            (self._leader or self)._sort_scores()
        self._sort_scores()
        if self._silent:
            self.finish_reason = "length"
            return Piece(self.index, "", [], self.finish_reason)
        offsets = []
        for token in batch:
            taken += 1
            offsets.append(self._length)
            text += self._read(token)
            if self.finish_reason is not None:
                break
        scores = [self._scores.popleft() for _ in range(min(taken, len(self._scores)))]
        return Piece(self.index, text, batch[:taken], self.finish_reason, offsets, scores)

    def _sort_scores(self) -> None:
        for scores in self.stream.scores:
            (self._prompt_scores if scores.position < len(self.prompt) else self._scores).append(scores)
        self.stream.scores.clear()

    def _read(self, token: int) -> str:
        """The text that a token adds; sets finish_reason when it is the last one."""
        self.tokens += 1
        if token in self._stop_ids:
            last = self._detokenizer.push(token) if self._include_stop else ""
            self.finish_reason = "stop"
            return self._close(last)
        text = self._detokenizer.push(token)
        self._length += len(text)
        if self.tokens > self._min_tokens:
            text = self._stops.push(text)
        if self._stops.stopped:
            self.finish_reason = "stop"
        return text

    def _close(self, last: str = "") -> str:
        """The text that was held back, once no token follows."""
        text = self._stops.push(last + self._detokenizer.flush())
        return text + self._stops.flush()

    def _end(self, finish: Finish) -> Piece:
        """The engine has ended the stream without a stop id."""
        if finish.reason not in ("stop", "length"):
            raise failure(finish)
        text = self._close()
        self.finish_reason = "stop" if self._stops.stopped else finish.reason
        return Piece(self.index, text, [], self.finish_reason)


def failure(finish: Finish) -> RequestError:
    """What to tell the client of a request that the engine gave up."""
    return RequestError(
        finish.error or "the request was cancelled",
        status=finish.status or 503,
        code=finish.code or "request_cancelled",
        retry_after=finish.retry_after or None,
    )


class Run:
    """All choices of one request. `close` must be called, however the request ends."""

    def __init__(self, engine: EngineFace, metrics: Metrics) -> None:
        self.choices: list[Choice] = []
        self._engine = engine
        self._metrics = metrics
        self._meters: dict[int, RequestMeter] = {}
        self._streams: list[TokenStream] = []
        self._next_pieces: dict[asyncio.Task[Piece], tuple[int, AsyncIterator[Piece]]] = {}

    def submit(self, generations: list[Generation]) -> list[TokenStream]:
        """Start the choices of one prompt. Raises RequestError."""
        meters = [self._metrics.request(generation) for generation in generations]
        streams = self._engine.submit(generations)
        self._streams += streams
        for stream, meter in zip(streams, meters, strict=True):
            self._meters[stream.request] = meter
            stream.watch(meter)
        return streams

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come. A reader that is slow gets fewer, larger ones."""
        if len(self.choices) == 1:
            async for piece in self._watch(self.choices[0]):
                yield piece
            return
        for choice in self.choices:
            self._wait_for(choice.index, self._watch(choice))
        while self._next_pieces:
            done, _ = await asyncio.wait(self._next_pieces, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: self._next_pieces[task][0]):
                index, source = self._next_pieces.pop(task)
                piece = task.result()
                yield piece
                if piece.finish_reason is None:
                    self._wait_for(index, source)

    @property
    def used(self) -> int:
        """Tokens of prompts and outputs; a choice whose prompt was not run costs nothing."""
        return sum(len(c.prompt) + c.tokens for c in self.choices if c.first_token is not None)

    async def close(self) -> None:
        """Cancel what still runs."""
        for stream in self._streams:
            if stream.finish is None:
                self._engine.cancel(stream.request)
        waiting = list(self._next_pieces)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _wait_for(self, index: int, source: AsyncIterator[Piece]) -> None:
        async def next_piece() -> Piece:
            return await anext(source)

        self._next_pieces[asyncio.create_task(next_piece())] = (index, source)

    async def _watch(self, choice: Choice) -> AsyncIterator[Piece]:
        """A choice that has all it wants before the engine knows (a stop string) is cancelled at once."""
        async for piece in choice.pieces():
            if piece.finish_reason is not None and choice.stream.finish is None:
                self._meters[choice.stream.request].stop_string()
                self._engine.cancel(choice.stream.request)
            yield piece

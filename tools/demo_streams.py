"""The demo's streams: what a client of the OpenAI API sees and when, and how that is shown.

Owns one stream's text and times, the wall on which all streams grow, and the table of times. Must not know
the daemon: a base URL is all there is.
"""

from __future__ import annotations

import asyncio
import math
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import openai
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_WIDE = 110
_REFRESH_PER_SECOND = 8
_LEAST_PANE_LINES, _MOST_PANE_LINES = 3, 10
_PANE_FRAME = 4  # columns that a pane's frame takes
_NO_CHAT = "chat template"  # in what the daemon says of a model that cannot chat


class Stream:
    """One answer, or several one after the other, as its reader sees it. All times are in seconds.

    text: of the answer of this moment. tokens: of all answers. first: from each request to its first piece.
    gaps: between one piece and the next. error: empty as long as nothing failed. unserved: the model has no
    chat template, which is no failure. on_end: called after each answer.
    """

    def __init__(self, service: str, prompt: str, max_tokens: int, *, chat: bool = False) -> None:
        self.service = service
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._chat = chat
        self.text = ""
        self.answers = 0
        self.tokens = 0
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.total = 0.0
        self.error = ""
        self.unserved = False
        self.on_end: Callable[[Stream], None] = lambda _: None

    @property
    def title(self) -> str:
        """Service and kind."""
        return f"{self.service} · {self.kind}"

    @property
    def kind(self) -> str:
        """Which endpoint."""
        return "chat" if self._chat else "text"

    async def run(self, client: openai.AsyncOpenAI) -> None:
        """Stream one answer. A failure is kept, not raised: the other streams go on."""
        self.text = ""
        began = last = time.perf_counter()
        try:
            async for piece in self._pieces(client):
                now = time.perf_counter()
                if self.text:
                    self.gaps.append(now - last)
                else:
                    self.first.append(now - began)
                self.text += piece
                last = now
        except openai.OpenAIError as error:
            self.unserved = isinstance(error, openai.BadRequestError) and _NO_CHAT in error.message
            self.error = "" if self.unserved else " ".join(str(error).split())
        self.answers += 1
        self.total += time.perf_counter() - began
        self.on_end(self)

    async def run_until(self, over: asyncio.Event, client: openai.AsyncOpenAI) -> None:
        """Stream one answer after the other until it is over, or one fails."""
        while not over.is_set() and not self.error:
            await self.run(client)

    async def _pieces(self, client: openai.AsyncOpenAI) -> AsyncIterator[str]:
        """The pieces of text, none empty; counts the tokens at the end."""
        common: dict[str, Any] = {
            "model": self.service,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._chat:
            message = {"role": "user", "content": self._prompt}
            common["messages"] = [message]
            chunks: Any = await client.chat.completions.create(**common)
        else:
            chunks = await client.completions.create(prompt=self._prompt, **common)
        async for chunk in chunks:
            if chunk.usage is not None:
                self.tokens += chunk.usage.completion_tokens
            for choice in chunk.choices:
                if piece := choice.delta.content if self._chat else choice.text:
                    yield piece


def mean(values: Sequence[float]) -> float:
    """The mean; not a number when there is nothing."""
    return sum(values) / len(values) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share (0 to 1) of all values do not exceed; nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def table_of(streams: Sequence[Stream]) -> Table:
    """Times per stream: to the first token, between tokens (mean and 95th percentile), in all."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("SERVICE", overflow="fold")
    table.add_column("KIND")
    for title in ("TOKENS", "FIRST", "BETWEEN", "P95", "TOTAL"):
        table.add_column(title, justify="right", no_wrap=True)
    for stream in streams:
        table.add_row(
            stream.service,
            stream.kind if not stream.error else "FAILED",
            str(stream.tokens),
            _seconds(mean(stream.first)),
            _milliseconds(mean(stream.gaps)),
            _milliseconds(percentile(stream.gaps, 0.95)),
            _seconds(stream.total),
        )
    return table


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f} s"


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 1000:.0f} ms"


class Wall:
    """All streams side by side while they grow; where there is no terminal, each answer as a line.

    A context manager around the time in which they run.
    """

    def __init__(self, console: Console, streams: Sequence[Stream]) -> None:
        self._console = console
        self._streams = streams
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=_REFRESH_PER_SECOND,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Wall:
        if self._console.is_terminal:
            self._live.start()
        else:
            for stream in self._streams:
                stream.on_end = self._tell
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _tell(self, stream: Stream) -> None:
        if not stream.unserved:
            said = stream.error or " ".join(stream.text.split())
            self._console.print(Text(f"{stream.title}: {said}"), soft_wrap=True)

    def _render(self) -> RenderableType:
        streams = [stream for stream in self._streams if not stream.unserved]
        columns = min(len(streams), 3 if self._console.width >= _WIDE else 2) or 1
        rows = math.ceil(len(streams) / columns) or 1
        lines = min(_MOST_PANE_LINES, max(_LEAST_PANE_LINES, (self._console.height - 1) // rows))
        width = self._console.width // columns - _PANE_FRAME
        panes = [_pane(stream, width, lines) for stream in streams]
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for start in range(0, len(panes), columns):
            grid.add_row(*panes[start : start + columns])
        return grid


def _pane(stream: Stream, width: int, lines: int) -> Panel:
    """The end of a stream's text, where it grows. width: columns of text; lines: with the frame."""
    said = " ".join((stream.error or stream.text).split())
    folded = textwrap.wrap(said, max(1, width))[-(lines - 2) :]
    wait = f"first token {stream.first[-1]:.2f} s" if stream.first else "waiting"
    style = "red" if stream.error else "green" if stream.answers else "blue"
    return Panel(
        Text("\n".join(folded)),
        title=Text(stream.title),
        subtitle=Text(wait),
        height=lines,
        border_style=style,
    )

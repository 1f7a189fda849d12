"""One service of an OpenAI-compatible server, as a client that measures.

Owns the streaming of one completion with its times, prompts of a wanted length, and what is learnt of a
service beforehand. Must not know traces.
"""

from __future__ import annotations

import ipaddress
import random
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np

from seallmd.sim.metrics import Served
from seallmd.sim.models import SimError

# Short and common: one token each in nearly every vocabulary.
_WORDS = ("time", "year", "people", "way", "day", "man", "world", "life", "house", "water", "book", "right")
_REPEATS = 2
_ERROR_CHARACTERS = 120


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Choice(msgspec.Struct):
    text: str | None = None


class _Event(msgspec.Struct):
    """One event of a stream, as far as it matters here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Line(msgspec.Struct, frozen=True):
    """T_iso as a line: seconds per request, per prompt token and per output token."""

    request: float
    prompt_token: float
    output_token: float

    def seconds(self, prompt: int, output: int) -> float:
        """T_iso of these token counts; never quite 0."""
        return max(1e-6, self.request + self.prompt_token * prompt + self.output_token * output)

    @classmethod
    def through(cls, served: Sequence[Served]) -> Line:
        """The line closest to these latencies, by least squares on relative errors; no part below zero."""
        points = [[1.0, float(s.prompt), float(s.output)] for s in served]
        latencies = np.array([s.latency for s in served])
        columns = [0, 1, 2]
        while columns:
            rows = np.array(points)[:, columns] / latencies[:, None]
            found, *_ = np.linalg.lstsq(rows, np.ones(len(points)))
            if (found >= 0).all():
                parts = dict(zip(columns, found.tolist(), strict=True))
                return cls(*(parts.get(column, 0.0) for column in range(3)))
            columns.pop(int(np.argmin(found)))
        raise AssertionError("latencies are positive, so one column alone has a positive factor")

    def __str__(self) -> str:
        return (
            f"{self.request * 1e3:.1f} ms + {self.prompt_token * 1e3:.3f} ms per prompt token "
            f"+ {self.output_token * 1e3:.2f} ms per output token"
        )


def is_loopback(url: str) -> bool:
    """Whether a URL can only lead to this machine: a name other than localhost might resolve to anything."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False
    try:
        return ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return parts.hostname == "localhost"


class Service:
    """A model behind a base URL. words_per_token, overhead_tokens: of prompts, as calibration found them.

    ignore_eos: the server takes that field, so that answers are as long as the trace says.
    """

    def __init__(self, name: str, url: str, model: str) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.model = model
        self.words_per_token = 1.0
        self.overhead_tokens = 0.0
        self.ignore_eos = True

    def prompt(self, tokens: int, words: random.Random) -> str:
        """Random words of about so many tokens: no two prompts have more than a beginning in common."""
        count = round((tokens - self.overhead_tokens) * self.words_per_token)
        return " ".join(words.choices(_WORDS, k=max(1, count)))

    def _tokens(self, prompt: str) -> int:
        return round(len(prompt.split()) / self.words_per_token + self.overhead_tokens)

    async def complete(
        self, session: aiohttp.ClientSession, prompt: str, output: int, due: float | None = None
    ) -> Served:
        """One streamed completion of `output` tokens, counted from `due` (perf_counter; now if None).

        A failure is in the record, not raised: the others go on. Token counts are the server's own; one that
        does not tell is taken to have had the prompt that was meant, and to send a token in each piece.
        """
        record = Served(self.name, time.perf_counter() if due is None else due, 0, 0, array("d"))
        try:
            async for event in self._events(session, prompt, output):
                self._take(record, event)
            record.prompt = record.prompt or self._tokens(prompt)
            record.output = record.output or len(record.times)
            if not record.error and not record.output:
                record.error = "the answer is empty"
        except TimeoutError:
            record.error = "timeout"
        except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
            record.error = record.error or f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
        record.finished = time.perf_counter()
        return record

    def _take(self, record: Served, event: _Event) -> None:
        if event.error is not None:
            record.error = str(event.error)[:_ERROR_CHARACTERS]
        if event.usage is not None:
            record.prompt, record.output = event.usage.prompt_tokens, event.usage.completion_tokens
        if any(choice.text for choice in event.choices):
            record.times.append(time.perf_counter())

    async def _events(
        self, session: aiohttp.ClientSession, prompt: str, output: int
    ) -> AsyncIterator[_Event]:
        """Each event of the stream. Raises ValueError or DecodeError for an answer that is none."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        # A redirect could lead to another machine.
        async with session.post(f"{self.url}/completions", json=body, allow_redirects=False) as answer:
            if answer.status != 200:
                text = " ".join((await answer.text()).split())
                raise ValueError(f"HTTP {answer.status} {text}")
            async for line in answer.content:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield msgspec.json.decode(data, type=_Event)


async def get_to_know(service: Service, session: aiohttp.ClientSession) -> None:
    """Learn a service's words and fields from a few requests. Raises SimError when it fails."""
    words = random.Random()
    first = await service.complete(session, service.prompt(16, words), 2)
    if "HTTP 400" in first.error or "HTTP 422" in first.error:
        service.ignore_eos = False
    short, long = await _asked(service, session, 8, 1, words), await _asked(service, session, 108, 1, words)
    if long.prompt > short.prompt > 0:
        service.words_per_token = 100 / (long.prompt - short.prompt)
        service.overhead_tokens = short.prompt - 8 / service.words_per_token


async def isolated_line(
    service: Service, session: aiohttp.ClientSession, prompts: Sequence[int], outputs: Sequence[int]
) -> Line:
    """T_iso of a service that is known, from requests one by one. Raises SimError when it fails."""
    words = random.Random()
    served = [
        await _asked(service, session, prompt, output, words)
        for _ in range(_REPEATS)
        for prompt in prompts
        for output in outputs
    ]
    return Line.through(served)


async def _asked(
    service: Service, session: aiohttp.ClientSession, prompt: int, output: int, words: random.Random
) -> Served:
    record = await service.complete(session, service.prompt(prompt, words), output)
    if record.error:
        raise SimError(f"{service.name} does not answer: {record.error}")
    return record

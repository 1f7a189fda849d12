"""seallmctl bench: a quick load test of the running daemon, and its report.

Owns the load and the figures. Must not know how answers come over the wire (`ctl.http`), nor how they are
shown. A closed loop: so many clients, each of which asks again as soon as it has its answer; requests go to
the services in turn. Prompts are random token ids, all different, so that no prefix helps.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from seallmd.ctl import http
from seallmd.errors import ControlError, Unreachable

_LEAST_TOKEN, _MOST_TOKEN = 100, 300  # ids that every model has, and that are ordinary text in most


@dataclass(frozen=True)
class Load:
    """What to ask. clients: how many ask at the same time. Tokens are of each request."""

    services: Sequence[str]
    requests: int
    clients: int
    prompt_tokens: int
    output_tokens: int


@dataclass
class Sample:
    """One request. Seconds since it was sent: of the first token and of the end. gaps: between two chunks."""

    service: str
    first_seconds: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str = ""


def run(address: str, load: Load, done: Callable[[int], None], clock: Callable[[], float]) -> dict[str, Any]:
    """Carry the load out; `done` is told after each request how many have ended. Returns the report."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(load.requests):
        todo.put(number)
    samples: list[Sample] = []
    lock = threading.Lock()

    def client() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            sample = _ask(address, load, number, clock)
            with lock:
                samples.append(sample)
                done(len(samples))

    started = clock()
    threads = [threading.Thread(target=client, daemon=True) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report(load, samples, clock() - started)


def _ask(address: str, load: Load, number: int, clock: Callable[[], float]) -> Sample:
    draw = random.Random(number)
    sample = Sample(load.services[number % len(load.services)])
    body = {
        "model": sample.service,
        "prompt": [draw.randint(_LEAST_TOKEN, _MOST_TOKEN) for _ in range(load.prompt_tokens)],
        "max_tokens": load.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    began = last = clock()
    try:
        for chunk in http.stream(address, "/v1/completions", body):
            now = clock()
            if chunk["choices"]:
                if sample.first_seconds:
                    sample.gaps.append(now - last)
                else:
                    sample.first_seconds = now - began
                last = now
            usage = chunk.get("usage") or {}
            sample.prompt_tokens = usage.get("prompt_tokens", sample.prompt_tokens)
            sample.output_tokens = usage.get("completion_tokens", sample.output_tokens)
    except (ControlError, Unreachable) as error:
        sample.error = str(error)
    sample.seconds = clock() - began
    return sample


def report(load: Load, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The figures, over all and by service. Times in seconds; null where nothing was measured."""
    by_service = {name: [s for s in samples if s.service == name] for name in dict.fromkeys(load.services)}
    return {
        "load": {**asdict(load), "services": list(load.services)},
        "seconds": seconds,
        "total": _figures(samples, seconds),
        "services": {name: _figures(own, seconds) for name, own in by_service.items()},
        "errors": sorted({sample.error for sample in samples if sample.error}),
    }


def _figures(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    good = [sample for sample in samples if not sample.error]
    output = sum(sample.output_tokens for sample in good)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (output + sum(s.prompt_tokens for s in good)) / seconds,
        "first_token": _spread([sample.first_seconds for sample in good]),
        "between_tokens": _spread([gap for sample in good for gap in sample.gaps]),
        "whole": _spread([sample.seconds for sample in good]),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (the value that so many are not above)."""
    if not values:
        return None
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    spread = {f"p{share}": percentile(share / 100) for share in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **spread, "max": ordered[-1]}


def default_clock() -> float:
    """Seconds."""
    return time.perf_counter()

"""Which request comes when: production traces, scaled, and made-up arrivals.

Owns the reading and scaling of trace files, MuxServe's popularity law, and the distributions. Must not know
devices or policies. The same arguments give the same arrivals; a service's draws do not depend on how many
other services there are.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seallmd.sim.models import SimError


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when (seconds from the start), for which service, and its lengths in tokens."""

    seconds: float
    service: str
    prompt: int
    output: int


# ------------------------------------------------------------------------------------------- traces


def read_trace(path: Path) -> list[Arrival]:
    """A CSV with columns seconds, prompt_tokens, output_tokens, by time; services are left empty.

    Raises SimError when the file cannot be read or has no such rows.
    """
    try:
        with path.open(newline="") as file:
            rows = [
                Arrival(float(r["seconds"]), "", int(r["prompt_tokens"]), int(r["output_tokens"]))
                for r in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SimError(f"{path.name} is no trace: {error!r}") from None
    if any(row.prompt < 1 or row.output < 1 for row in rows):
        raise SimError(f"{path.name} has a request without tokens")
    rows.sort(key=lambda row: row.seconds)
    if len(rows) < 2 or rows[-1].seconds <= rows[0].seconds:
        raise SimError(f"{path.name} is no trace: it needs rows at two times")
    first = rows[0].seconds
    return [replace(row, seconds=row.seconds - first) for row in rows]


def scaled(traces: Sequence[Sequence[Arrival]], rate: float, seconds: float) -> list[list[Arrival]]:
    """The traces from their beginning, all run so fast that `rate * seconds` requests come in `seconds`.

    Compressing time keeps the shape of bursts, which thinning out would flatten. Traces that end too early
    begin again, all at once, one mean gap after the last of their requests.
    """
    times = sorted(row.seconds for rows in traces for row in rows)
    round_seconds = times[-1] * len(times) / (len(times) - 1)
    rounds, rest = divmod(max(1, round(rate * seconds)), len(times))
    taken = rounds * round_seconds + times[rest]  # of the traces' own time; the next request is too late
    factor = taken / seconds

    def repeated(rows: Sequence[Arrival]) -> list[Arrival]:
        whole = [(row.seconds + n * round_seconds, row) for n in range(rounds + 1) for row in rows]
        return [replace(row, seconds=at / factor) for at, row in whole if at < taken]

    return [repeated(rows) for rows in traces]


def from_traces(
    traces: Sequence[Sequence[Arrival]],
    services: Sequence[str],
    *,
    rate: float,
    seconds: float,
    alpha: float,
    seed: int,
) -> list[Arrival]:
    """Traces scaled so that all services together get `rate` requests per second, as far as ties allow.

    Trace f of F serves services f, f + F, f + 2F, ...: with as many traces as services, each has its own.
    Several services of one trace share its requests at random by the power law.
    """
    found = []
    for index, rows in enumerate(scaled(traces[: len(services)], rate, seconds)):
        own = services[index :: len(traces)]
        generator = np.random.default_rng([seed, index])
        chosen = generator.choice(len(own), size=len(rows), p=popularity(len(own), alpha))
        found += [replace(row, service=own[c]) for row, c in zip(rows, chosen, strict=True)]
    return sorted(found, key=lambda arrival: arrival.seconds)


# ------------------------------------------------------------------------------------------- made up


def popularity(services: int, alpha: float) -> list[float]:
    """Shares of services 0, 1, ...: proportional to (i + 1) ** -alpha (MuxServe, section 4.1)."""
    weights = [(i + 1) ** -alpha for i in range(services)]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Lengths:
    """Lognormal token counts with these means; sigma: of the logarithm. Defaults: means of ShareGPT."""

    prompt: float = 161.0
    output: float = 337.0
    sigma: float = 0.9

    def draw(self, generator: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
        """Prompt and output tokens of so many requests."""
        prompts = self._lognormal(generator, self.prompt, count)
        return prompts, self._lognormal(generator, self.output, count)

    def _lognormal(self, generator: np.random.Generator, mean: float, count: int) -> list[int]:
        drawn = generator.lognormal(math.log(mean) - self.sigma**2 / 2, self.sigma, count)
        return [max(1, round(value)) for value in drawn.tolist()]


def synthetic(
    services: Sequence[str],
    *,
    rate: float,
    seconds: float,
    alpha: float,
    seed: int,
    cv: float = 1.0,
    lengths: Lengths | None = None,
) -> list[Arrival]:
    """Independent arrivals, `rate` requests per second in all, by the power law.

    cv: coefficient of variation of the gaps, which are Gamma distributed; 1 is a Poisson process, more comes
    in bursts, 0 is a fixed gap.
    """
    lengths = lengths or Lengths()
    found = []
    for index, (service, share) in enumerate(zip(services, popularity(len(services), alpha), strict=True)):
        generator = np.random.default_rng([seed, index])
        times = _times(generator, rate * share, seconds, cv)
        prompts, outputs = lengths.draw(generator, len(times))
        found += [Arrival(*row) for row in zip(times, [service] * len(times), prompts, outputs, strict=True)]
    return sorted(found, key=lambda arrival: arrival.seconds)


def _times(generator: np.random.Generator, rate: float, seconds: float, cv: float) -> list[float]:
    times: list[float] = []
    at = 0.0
    while True:
        count = max(16, int(rate * (seconds - at) * 1.1))
        gaps = generator.gamma(1 / cv**2, cv**2 / rate, count) if cv > 0 else np.full(count, 1 / rate)
        for gap in gaps.tolist():
            at += gap
            if at >= seconds:
                return times
            times.append(at)


def fitted(arrival: Arrival, context: int) -> Arrival:
    """A request cut to a context: its output to half of it, then its prompt to what is left."""
    output = min(arrival.output, context // 2)
    return replace(arrival, output=output, prompt=min(arrival.prompt, context - output))


def resized(arrival: Arrival, factor: float) -> Arrival:
    """A request with so many times the tokens, for devices that are slower than the trace's; at least one."""
    lengths = (max(1, round(tokens * factor)) for tokens in (arrival.prompt, arrival.output))
    return Arrival(arrival.seconds, arrival.service, *lengths)

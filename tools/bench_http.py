"""What serving adds to the engine: HTTP with streaming, a start, prefixes and chunks, in one run.

    python -m tools.bench_http models/smollm2-135m-instruct

Starts daemons of its own, one CPU device each, and asks them as clients would. Parts, in this order:

- `streams`: tokens/s of streamed completions, the engine alone (`bench_engine`) taking turns with the daemon;
  the share of time in which the device computed, by the journal's step times; the event loop's CPU time.
- `loop`: 256 streams from a tiny random model: the event loop's CPU time per token, at 2,000 tokens/s.
- `prefix`: random prompts with prefix reuse and without; first token of a long prompt, and of it again.
- `chunks`: random prompts with prefill in chunks and in one piece.
- `models`: three services of the model at once on two devices, and one of them alone with as many streams.
- `start`: from the command to a ready worker and to the first token, with an empty cache and again.

Absolute figures drift by 10 to 20% on shared machines: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.runtime.journal import read
from seallmd.worker.process import quiet_libraries
from tools.bench_engine import Engine
from tools.demo import Daemon

_READY_SECONDS = 300.0
_TICK = os.sysconf("SC_CLK_TCK")
_MEMORY = "2 GiB"
_LONG_PROMPT = 2000
_LOOP_STREAMS = 256
_LOOP_RATE = 2000  # tokens/s at which the event loop's share is stated
_MODELS = 3
PARTS = ("streams", "loop", "prefix", "chunks", "models", "start")


class Answer(NamedTuple):
    """One streamed completion: seconds to its first text and to its end."""

    first: float
    whole: float


class Served(NamedTuple):
    """What came of several completions at once. loop: CPU seconds of the daemon's event loop; cpu: of all its
    processes."""

    seconds: float
    loop: float
    cpu: float
    answers: list[Answer]


class Bench:
    """A daemon with services `m0`, `m1`, ... of one model. more: lines of the `[policy]` table."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        cache: Path,
        dtype: str,
        threads: int,
        more: str = "",
        workers: int = 1,
        services: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "seallmd.toml"
        configuration.write_text(
            f'[http]\nport = 0\n[devices]\nkind = "cpu"\ncpu_workers = {workers}\nthreads = {threads}\n'
            f'memory = "{_MEMORY}"\ncache = "{cache}"\n'
            f"[policy]\nmax_rows = 256\n{more}\n"
            + "".join(
                f'[[service]]\nname = "m{n}"\nmodel = "{model.resolve()}"\ndtype = "{dtype}"\n'
                for n in range(services)
            )
        )
        self.journal = folder / "journal"
        self.started = time.perf_counter()
        self._daemon = Daemon(configuration, folder, "--journal", str(self.journal))
        until = self.started + _READY_SECONDS
        while not self._daemon.is_healthy():
            self._daemon.check()
            if time.perf_counter() > until:
                raise SystemExit(f"bench_http: the daemon is not ready\n{self._daemon.end_of_log()}")
            time.sleep(0.02)
        self.ready = time.perf_counter()

    def ask(self, prompts: Sequence[Sequence[int]], new: int, services: int = 1) -> Served:
        """All at once, each answered with `new` tokens, by so many services in turn."""
        loop, cpu, begun = self._loop_seconds(), self.cpu_seconds(), time.perf_counter()
        answers = asyncio.run(self._ask(prompts, new, services))
        seconds = time.perf_counter() - begun
        return Served(seconds, self._loop_seconds() - loop, self.cpu_seconds() - cpu, answers)

    async def _ask(self, prompts: Sequence[Sequence[int]], new: int, services: int) -> list[Answer]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            streams = (
                self._stream(session, f"m{n % services}", prompt, new) for n, prompt in enumerate(prompts)
            )
            return await asyncio.gather(*streams)

    async def _stream(
        self, session: aiohttp.ClientSession, service: str, prompt: Sequence[int], new: int
    ) -> Answer:
        body = {"model": service, "prompt": list(prompt), "max_tokens": new, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        begun, first, last = time.perf_counter(), 0.0, b""
        async with session.post(f"{self._daemon.base_url}/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first, last = first or time.perf_counter(), line
        if response.status != 200 or json.loads(last[6:])["usage"]["completion_tokens"] != new:
            raise SystemExit(f"bench_http: HTTP {response.status}, and at the end {last[:200]!r}")
        return Answer(first - begun, time.perf_counter() - begun)

    def _loop_seconds(self) -> float:
        """CPU time of the daemon's main thread, which runs the event loop."""
        pid = self._daemon.pid
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def cpu_seconds(self) -> float:
        """CPU time of the daemon and all its processes since the command."""
        daemon = psutil.Process(self._daemon.pid)
        return sum(sum(process.cpu_times()[:4]) for process in (daemon, *daemon.children(recursive=True)))

    def device(self) -> str:
        """What the daemon's first device says of itself: whether its operations are compiled, too."""
        status = self._daemon.status()
        return "unknown" if status is None else str(status["devices"][0]["label"])

    def end(self) -> None:
        """Stop the daemon."""
        self._daemon.stop()

    def steps(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) of every step, once the daemon has ended."""
        return [(now, said.seconds) for now, said in self._heard() if isinstance(said, msg.StepDone)]

    def bringing_in(self) -> tuple[float, float]:
        """Seconds that the host image took, and coming in from there, once the daemon has ended."""
        said = [said for _, said in self._heard()]
        image = next(m.seconds for m in said if isinstance(m, msg.ImageReady))
        return image, next(m.seconds for m in said if isinstance(m, msg.CopyDone))

    def _heard(self) -> list[tuple[float, msg.Message]]:
        """(when, what) the daemon heard from its children."""
        kinds = (ev.FromDevice, ev.FromHostProcess)
        _, records = read(self.journal)
        return [(r.now, r.event.message) for r in records if isinstance(r.event, kinds)]


def busy_share(steps: Sequence[tuple[float, float]]) -> float:
    """The share of time in which steps ran.

    A pause of more than a second is one between two runs: nobody wanted anything.
    """
    busy = wall = 0.0
    for (before, _), (now, seconds) in pairwise(steps):
        if now - before < 1.0 + seconds:
            busy, wall = busy + min(seconds, now - before), wall + now - before
    return busy / wall if wall else float("nan")


class Run:
    """The parts of a run; each prints what it found."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder, self._cache = options, folder, folder / "cache"
        self._cache.mkdir()
        self._words = random.Random(1)
        self._daemons = 0

    def _serving(
        self,
        more: str = "",
        model: Path | None = None,
        cache: Path | None = None,
        workers: int = 1,
        services: int = 1,
    ) -> Bench:
        o, self._daemons = self._options, self._daemons + 1
        folder = self._folder / str(self._daemons)
        return Bench(
            folder, model or o.model, cache or self._cache, o.dtype, o.threads, more, workers, services
        )

    def _prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [self._words.choices(range(100, 2000), k=tokens) for _ in range(count)]

    def streams(self) -> None:
        """Through HTTP, and the engine alone."""
        o = self._options
        engine = Engine(o.model, o.dtype, o.streams * (o.prompt + o.new + 64), self._cache, compiled=True)
        bench = self._serving()
        alone, served = [], []
        try:
            bench.ask(self._prompts(1, 8), 2)  # brings the model in
            device = bench.device()
            for _ in range(o.repeats):
                prompts = self._prompts(o.streams, o.prompt)
                alone.append(engine.run(prompts, o.new).whole)
                served.append(bench.ask(prompts, o.new))
        finally:
            bench.end()
        tokens = o.streams * o.new
        rates = [tokens / statistics.median(s) for s in (alone, [s.seconds for s in served])]
        loss = statistics.median(1 - a / s.seconds for a, s in zip(alone, served, strict=True))
        loop = sum(s.loop for s in served) / (tokens * len(served))
        print(f"streams: {o.streams} of {o.prompt} + {o.new} tokens, {o.dtype}; {device}")
        print(f"  engine alone {rates[0]:.1f} tokens/s, HTTP {rates[1]:.1f}: loss {loss:.1%}")
        print(f"  the device computed {busy_share(bench.steps()):.1%} of the time")
        print(f"  event loop: {loop * 1e6:.0f} us of CPU time a token", flush=True)

    def loop(self) -> None:
        """Many streams from a model that costs next to nothing."""
        model = self._folder / "tiny"
        _save_tiny(model, self._options.model)
        bench = self._serving(model=model)
        try:
            bench.ask(self._prompts(1, 8), 2)
            served = bench.ask(self._prompts(_LOOP_STREAMS, 16), self._options.new)
        finally:
            bench.end()
        tokens = _LOOP_STREAMS * self._options.new
        rate, each = tokens / served.seconds, served.loop / tokens
        share = served.loop / served.seconds
        print(f"loop: {_LOOP_STREAMS} streams, {rate:.0f} tokens/s, event loop {share:.0%} of a core")
        print(
            f"  {each * 1e6:.0f} us a token: {each * _LOOP_RATE:.1%} of a core at {_LOOP_RATE} tokens/s",
            flush=True,
        )

    def prefix(self) -> None:
        """Prefix reuse: what it costs where it does not help, and what it gives where it does."""
        o = self._options
        with_, without = self._serving("prefix_reuse = true"), self._serving("prefix_reuse = false")
        try:
            ratio = self._compare(with_, without)
            turns = [self._twice(with_) for _ in range(o.repeats)]
        finally:
            with_.end()
            without.end()
        first, again = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        print(f"prefix: with reuse {ratio}, {o.streams} random prompts")
        print(
            f"  first token behind {_LONG_PROMPT} prompt tokens {first:.3f} s, again {again:.3f} s:", end=""
        )
        print(f" {statistics.median(a / b for a, b in turns):.1f} times sooner", flush=True)

    def _twice(self, bench: Bench) -> tuple[float, float]:
        """Seconds to the first token of a long prompt, and of the same prompt again."""
        prompt = self._prompts(1, _LONG_PROMPT)[0]
        first, again = (bench.ask([prompt], 4).answers[0].first for _ in range(2))
        return first, again

    def chunks(self) -> None:
        """Prefill in chunks beside decodes, and whole prompts at once."""
        small, large = self._serving("step_tokens = 256"), self._serving("step_tokens = 8192")
        try:
            ratio = self._compare(small, large)
        finally:
            small.end()
            large.end()
        print(f"chunks: steps of 256 tokens, against steps of 8192: {ratio}", flush=True)

    def _compare(self, one: Bench, other: Bench) -> str:
        """tokens/s of `one` over those of `other`, and its CPU time over the other's, which other jobs of the
        machine change less: medians of pairs that take turns, and their range."""
        o = self._options
        for bench in (one, other):
            bench.ask(self._prompts(1, 8), 2)
        rates, costs = [], []
        for turn in range(o.repeats):
            pair = (one, other) if turn % 2 else (other, one)
            served = {bench: bench.ask(self._prompts(o.streams, o.prompt), o.new) for bench in pair}
            rates.append(served[other].seconds / served[one].seconds)
            costs.append(served[one].cpu / served[other].cpu)
        return f"{_spread(rates)} x the tokens/s, {_spread(costs)} x the CPU time"

    def models(self) -> None:
        """One service on two devices, and three that share them."""
        o = self._options
        bench = self._serving(workers=2, services=_MODELS)
        rates: dict[int, list[float]] = {1: [], _MODELS: []}
        try:
            for repeat in range(o.repeats + 1):
                for services, found in rates.items():
                    served = bench.ask(self._prompts(o.streams, o.prompt), o.new, services)
                    if repeat:  # the first brings them in
                        found.append(o.streams * o.new / served.seconds)
        finally:
            bench.end()
        one, all_ = (statistics.median(found) for found in rates.values())
        print(
            f"models: one on two devices {one:.1f} tokens/s, {_MODELS} at once {all_:.1f}: {all_ / one:.2f}"
        )

    def start(self) -> None:
        """A start with nothing in the cache, and the next ones. CPU time tells what others of the machine do
        not change."""
        cache = self._folder / "cold"
        cache.mkdir()
        for name in ("empty cache", *("again" for _ in range(self._options.repeats))):
            bench = self._serving(cache=cache)
            try:
                used = [bench.cpu_seconds()]
                first = bench.ask(self._prompts(1, 8), 1).answers[0].first
                used.append(bench.cpu_seconds())
            finally:
                bench.end()
            image, coming = bench.bringing_in()
            ready = bench.ready - bench.started
            print(f"start, {name}: ready {ready:.2f} s after the command ({used[0]:.2f} s of CPU time),")
            print(f"  first token {first:.2f} s later ({used[1] - used[0]:.2f} s), ", end="")
            print(f"host image {image:.2f} s, coming in {coming:.2f} s", flush=True)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _save_tiny(directory: Path, like: Path) -> None:
    """A random model with the tokenizer of another."""
    vocabulary = json.loads((like / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).symlink_to((like / name).resolve())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="what serving adds to the engine")
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="seallmd-bench-") as folder:
        run = Run(options, Path(folder))
        for part in options.parts:
            getattr(run, part)()


if __name__ == "__main__":
    main()

"""Speed of the engine alone, beside transformers, llama.cpp and vLLM on the same work, in one run.

    python -m tools.bench_engine models/smollm2-135m-instruct --threads 1
    ... --llama llama-batched-bench --gguf smollm2-f16.gguf --vllm venv-of-vllm/bin/python

No daemon, no HTTP: the worker's own code in this process, driven by the messages it gets in service. Every
figure is taken `--repeats` times, the contestants taking turns, because machines drift; the table shows the
median and the range. The limits are measured in the same run: memory read for decode (every weight is read
once a step), matrix products for prefill. Compare within one run only.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from seallmd.core import messages as msg
from seallmd.worker import ops
from seallmd.worker.attention import answered_by
from seallmd.worker.device import CpuDevice
from seallmd.worker.host import Host
from seallmd.worker.kv import KvView, Span
from seallmd.worker.paged import PagedBatch
from seallmd.worker.process import quiet_libraries
from seallmd.worker.skeleton import DTYPES
from seallmd.worker.worker import Worker
from tools.engine_peers import STEP_TOKENS, Runner, Times, llama_runner, transformers_runner, vllm_runner

_BLOCK_BYTES = 512 << 10
_PROBE_BYTES = 512 << 20


class Engine:
    """Host and worker of one service, called directly. compiled: with the compiled operations or not.

    tokens, kv_bytes: room for KV, together.
    """

    def __init__(
        self, directory: Path, dtype: str, tokens: int, cache: Path, compiled: bool, kv_bytes: int = 0
    ) -> None:
        if not compiled:
            ops.stop()
        else:
            ops.start(cache, print)
        self._said: list[Any] = []
        self._steps = self._requests = 0
        settings = msg.WorkerSettings("bench", "cpu", block_bytes=_BLOCK_BYTES, cache=str(cache))
        host = Host(settings, self._said.append, lambda item: host.handle(item))
        host.handle(msg.Probe("bench", str(directory), dtype=dtype, context=0))
        probed = self._last(msg.Probed)
        host.handle(msg.BuildImage("bench"))
        image = self._last(msg.ImageReady)
        shape = probed.shape
        self.shape = shape
        extents, first, at = [], 0, 0
        for size in shape.segments:
            extents.append(msg.Extent(at, size, first * _BLOCK_BYTES))
            first, at = first + -(-size // _BLOCK_BYTES), at + size
        blocks = first + tokens // (_BLOCK_BYTES // shape.kv_bytes_per_token) + 64
        blocks += kv_bytes // _BLOCK_BYTES
        arena = msg.WorkerSettings("b", "cpu", arena_bytes=blocks * _BLOCK_BYTES, block_bytes=_BLOCK_BYTES)
        self._device = CpuDevice(arena)
        self._worker = Worker(self._device, arena, self._said.append)
        self._kv_at = first * _BLOCK_BYTES
        copy = msg.CopyIn("bench", probed.directory, shape.dtype, shape.context, image.path, tuple(extents))
        self._worker.handle(copy)
        while self._worker.copying:
            self._worker.advance()
        self._last(msg.CopyDone)
        self._host = host  # owns the image
        self.weight_bytes = sum(shape.segments)
        resident = self._worker._resident["bench"]
        # Prefill needs logits of its last row alone: the vocabulary layer is no part of its work.
        self.model = model = resident.model
        ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.lm_head)}
        weights = (p.numel() for name, p in model.named_parameters() if not name.endswith(".scale"))
        self.layer_weights = sum(weights) - sum(ends.values())
        fast = resident.fast
        self.what = (
            "plain torch" if fast is None else f"{len(fast.layers or ())} of {len(shape.layers)} layers whole"
        )
        if fast is not None and fast.stack is not None:
            self.what += ", in one call"
        self.lay_out("merged", _BLOCK_BYTES)

    def lay_out(self, layout: str, block_bytes: int) -> None:
        """Lay out KV in this way from here on; what there is of it is lost."""
        resident, arena = self._worker._resident["bench"], self._device.arena
        arena = arena[: len(arena) // block_bytes * block_bytes]
        kv = KvView(arena, block_bytes, self.shape.layers, DTYPES[self.shape.dtype], layout)
        resident.kv = kv
        if resident.fast is not None:
            resident.fast.bind(kv)
        self.page = kv.page
        self.free = list(range(-(-self._kv_at // block_bytes), len(arena) // block_bytes))
        random.Random(0).shuffle(self.free)

    def _last(self, kind: type) -> Any:
        said = [message for message in self._said if not isinstance(message, msg.JobProgress)][-1]
        self._said.clear()
        if not isinstance(said, kind):
            raise SystemExit(f"bench_engine: {said}")
        return said

    def run(self, prompts: list[list[int]], new: int) -> Times:
        """Prefill all prompts, then decode all of them together, greedily; `drawn` are then their answers."""
        ids, tables = range(self._requests, self._requests + len(prompts)), []
        self._requests += len(prompts)
        self.drawn: list[list[int]] = []
        started = time.perf_counter()
        for request, prompt in zip(ids, prompts, strict=True):
            need = self.page.holding(len(prompt) + new) * self.page.blocks
            tables.append([self.free.pop() for _ in range(need)])
            for at in range(0, len(prompt), STEP_TOKENS):
                count = min(STEP_TOKENS, len(prompt) - at)
                greedy = msg.Sampling(temperature=0.0)
                admit = (msg.Admit(request, tuple(prompt), len(prompt), greedy),) if at == 0 else ()
                table = tuple(tables[-1]) if at == 0 else ()
                drawn = self.step(admit, (msg.Row(request, at, count, at + count == len(prompt), table),))
            self.drawn.append(list(drawn))
        prefilled = time.perf_counter()
        steps = []
        for n in range(new - 1):
            begun = time.perf_counter()
            rows = (
                msg.Row(request, len(prompt) + n, 1, True)
                for request, prompt in zip(ids, prompts, strict=True)
            )
            drawn = self.step((), tuple(rows))
            steps.append(time.perf_counter() - begun)
            for answer, token in zip(self.drawn, drawn, strict=True):
                answer.append(token)
        ended = time.perf_counter()
        self._worker.handle(msg.Forget(tuple(ids)))
        self.free += [block for table in tables for block in table]
        return Times(prefilled - started, statistics.median(steps), ended - started)

    def step(self, admit: tuple[msg.Admit, ...], rows: tuple[msg.Row, ...]) -> tuple[int, ...]:
        """Run one step; returns what it drew."""
        self._steps += 1
        self._worker.handle(msg.Step(self._steps, "bench", admit, rows))
        drawn: tuple[int, ...] = self._last(msg.StepDone).tokens
        return drawn

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """What the model says behind each of `tokens`: [tokens, vocabulary] float32."""
        resident = self._worker._resident["bench"]
        table = self.free[: self.page.holding(len(tokens)) * self.page.blocks]
        span = Span(0, len(tokens), len(tokens), table)
        native = ops.compiled() if resident.fast is not None else None
        assert resident.kv is not None, "it is bound"
        with answered_by(PagedBatch(resident.kv, [span], torch.device("cpu"), native)):
            ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
            found: torch.Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return found[0].float()


def read_bandwidth() -> float:
    """Bytes a second that this process's threads read from memory, best of a few."""
    data = torch.ones(_PROBE_BYTES // 4)
    return _PROBE_BYTES / _best(data.sum)


def matrix_rate() -> float:
    """Floating-point operations a second in float32 matrix products, best of a few."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / _best(lambda: a @ a)


def _best(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="speed of the engine alone")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate for each prompt")
    parser.add_argument("--long", action="store_true", help="prompts of 1024 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--torch", action="store_true", help="also without the compiled operations")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--llama", type=Path, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="the same model for llama.cpp")
    parser.add_argument("--vllm", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--vllm-dtypes", nargs="+", default=["float32"])
    options = parser.parse_args()
    if options.long:
        options.prompt = 1024
    if options.gguf and options.llama is None:
        parser.error("--gguf needs --llama")
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache, ExitStack() as peers:
        _bench(options, Path(cache), peers)


def _bench(options: argparse.Namespace, cache: Path, peers: ExitStack) -> None:
    tokens = max(options.batches) * (options.prompt + options.new + 64)
    engines: dict[str, Engine] = {}
    for dtype in options.dtypes:
        engines[f"seallmd {dtype}"] = Engine(options.model, dtype, tokens, cache, compiled=True)
        if options.torch:
            engines[f"seallmd {dtype}, torch"] = Engine(options.model, dtype, tokens, cache, compiled=False)
    runners: dict[str, Runner] = {n: e.run for n, e in engines.items()}
    for gguf in options.gguf:
        runners[f"llama.cpp {gguf.stem}"] = llama_runner(options.llama, gguf, options.threads)
    for dtype in options.vllm_dtypes if options.vllm else ():
        length = options.prompt + options.new
        running = vllm_runner(options.vllm, options.model, dtype, options.threads, length)
        runners[f"vllm {dtype}"] = peers.enter_context(running)
    if not options.alone:
        runners["transformers float32"] = transformers_runner(options.model)
    bandwidth, flops = read_bandwidth(), matrix_rate()
    print(f"{options.threads} threads, prompts of {options.prompt}, {options.new} new tokens each")
    print(f"memory read {bandwidth / 1e9:.1f} GB/s, float32 matrix products {flops / 1e9:.0f} GFLOP/s")
    for name, engine in engines.items():
        print(f"{name}: {engine.what}, {engine.weight_bytes / 1e6:.0f} MB of weights")
    print(
        f"{'':32} streams  tokens/s (range)      ratio  decode ms  of read limit  prefill tokens/s  of matrix"
    )
    rng = random.Random(1)
    for streams in options.batches:
        prompts = [rng.choices(range(100, 2000), k=options.prompt) for _ in range(streams)]
        found: dict[str, list[Times]] = {name: [] for name in runners}
        for _ in range(options.repeats):
            for name, run in runners.items():
                found[name].append(run(prompts, options.new))
        base = _rate(found[next(reversed(runners))], streams * options.new)[1]
        for name, times in found.items():
            _line(name, engines.get(name), times, streams, options, base, bandwidth, flops)


def _rate(times: list[Times], tokens: int) -> tuple[float, float, float]:
    """Least, median and largest tokens a second."""
    rates = sorted(tokens / t.whole for t in times)
    return rates[0], statistics.median(rates), rates[-1]


def _line(
    name: str,
    engine: Engine | None,
    times: list[Times],
    streams: int,
    options: argparse.Namespace,
    base: float,
    bandwidth: float,
    flops: float,
) -> None:
    least, rate, most = _rate(times, streams * options.new)
    text = f"{name:32} {streams:7}  {rate:7.1f} ({least:.0f} to {most:.0f})".ljust(62)
    text += f"  {rate / base:5.2f}"
    if engine is not None:
        decode = statistics.median(t.decode for t in times)
        prefill = streams * options.prompt / statistics.median(t.prefill for t in times)
        work = 2 * prefill * engine.layer_weights
        text += f"  {decode * 1e3:9.1f}  {engine.weight_bytes / bandwidth / decode:13.0%}"
        text += f"  {prefill:16.0f}  {work / flops:9.0%}"
    print(text, flush=True)


if __name__ == "__main__":
    main()

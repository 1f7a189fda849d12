"""The engine on one GPU, without network and checkpoints: random weights of real shapes.

    python -m tools.bench_gpu                      # under 8 minutes on one large GPU
    python -m tools.bench_gpu --device cpu --tiny  # the same code at a size for tests

No daemon: the worker's own code in this process, driven by the messages that it gets in service. First every
operation of the device against the same operation on the CPU in float32; then, model by model, decode steps
by batch, prefill by length, swapping out and in again, and a captured graph replayed after the swap. Beside
the figures stand the device's limits, measured in the same run: a decode step reads every weight once (a
mixture of experts fewer, in small batches), prefill is matrix products. Weights are noise, as is the text.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from seallmd.core import messages as msg
from seallmd.worker.attention import Call, answered_by
from seallmd.worker.device import Device, open_device
from seallmd.worker.kv import KvView
from seallmd.worker.layout import Layout, layout_of
from seallmd.worker.paged import PagedBatch, Span
from seallmd.worker.process import quiet_libraries
from seallmd.worker.sampler import Draw, sample
from seallmd.worker.skeleton import build_skeleton
from seallmd.worker.worker import Worker

_GREEDY = msg.Sampling(temperature=0.0)
_CPU = torch.device("cpu")
_PROMPT = 64  # tokens before decoding
_SERVICE = "bench"

# By the published configurations; the key starts with the model type.
_SHAPES: dict[str, dict[str, Any]] = {
    "llama Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen3 Qwen3-0.6B": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "gemma3_text Gemma-3-4B": {
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    },
    "olmoe OLMoE-1B-7B": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32768,
    },
}
_TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


class Sizes(NamedTuple):
    """What is run. kv_bytes: of the arena, beside the weights. probe: rows of matrices that show limits."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    kv_bytes: int
    block_bytes: int
    probe: int


FULL = Sizes((1, 16, 64, 256), (512, 2048, 8192, 16384), 20, 8 << 30, 2 << 20, 8192)
SMALL = Sizes((1, 4), (16, 64), 2, 8 << 20, 8192, 64)


# ------------------------------------------------------------------------------------------------ limits


class Limits(NamedTuple):
    """bandwidth: bytes read a second. matrix: floating-point operations a second, in bfloat16."""

    bandwidth: float
    matrix: float


def measure_limits(device: torch.device, rows: int) -> Limits:
    """Best of a few."""
    data = torch.ones(rows * rows * 4, device=device)
    a = torch.randn(rows, rows, device=device).bfloat16()
    bandwidth = data.numel() * 4 / _best(device, data.sum)
    return Limits(bandwidth, 2 * rows**3 / _best(device, lambda: a @ a))


def _best(device: torch.device, function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        _finish(device)
        begun = time.perf_counter()
        function()
        _finish(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------ parity


class Case(NamedTuple):
    """One kind of attention. spans: (tokens, context) of each request."""

    name: str
    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


_CASES = (
    Case("decode", ((1, 1), (1, 70), (1, 300), (1, 33))),
    Case("chunks beside decodes", ((9, 9), (1, 131), (30, 77), (2, 64))),
    Case("sliding window", ((1, 131), (30, 77), (40, 40)), window=17),
    Case("capped scores", ((1, 131), (30, 77)), softcap=2.0),
    Case("sinks", ((1, 131), (30, 77)), sinks=True),
)


def attention_error(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between attention on `device` in `dtype` and on the CPU in float32, on the same
    rounded numbers, relative to the largest output."""
    shape, tokens, block_tokens = msg.LayerShape(2, 64, 64), sum(t for t, _ in case.spans), 16
    spans, at, blocks = [], 0, 0
    for count, context in case.spans:
        need = -(-context // block_tokens)
        spans.append(Span(at, count, context, list(range(blocks, blocks + need))[::-1]))
        at, blocks = at + count, blocks + need
    noise = torch.Generator().manual_seed(3)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=noise).to(dtype)

    query, key, value = some(1, 8, tokens, 64), some(1, 2, tokens, 64), some(1, 2, tokens, 64)
    sinks, stored = some(8) if case.sinks else None, some(2, blocks, block_tokens, 2, 64)
    outs = []
    for where, kind in ((_CPU, torch.float32), (device, dtype)):
        size = block_tokens * 2 * 128 * kind.itemsize
        kv = KvView(torch.zeros(blocks * size, dtype=torch.uint8, device=where), size, [shape], kind)
        for view, numbers in zip(kv.views(0), stored, strict=True):
            view.copy_(numbers)
        q, k, v = (t.to(where, kind) for t in (query, key, value))
        s = None if sinks is None else sinks.to(where, kind)
        call = Call(0, q, k, v, 0.125, case.window, case.softcap, s, bidirectional=False, unknown=())
        outs.append(PagedBatch(kv, spans, where).attend(call).float().cpu())
    return float((outs[1] - outs[0]).abs().max() / outs[0].abs().max())


def sampling_agrees(device: torch.device) -> float:
    """The share of rows that draw on `device` what they draw on the CPU."""
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(5)) * 3
    kinds = (
        _GREEDY,
        msg.Sampling(seed=1),
        msg.Sampling(temperature=0.7, top_p=0.9, seed=2),
        msg.Sampling(temperature=1.3, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=3),
    )
    draws = [Draw(kinds[row % len(kinds)], [row, 7, 9], 1) for row in range(len(logits))]
    same = sample(logits, draws) == sample(logits.to(device), draws).cpu()
    return float(same.float().mean())


def copies_agree(device: Device, block_bytes: int) -> bool:
    """Whether blocks come back from host memory as they went."""
    blocks = device.arena.view(-1, block_bytes)
    before = torch.randint(
        0, 256, blocks[:3].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    blocks[:3].copy_(before)
    device.save([0, 1, 2], [2, 0, 1])
    blocks[:3].zero_()
    device.restore([2, 0, 1], [0, 1, 2])
    device.wait_for([(0, 1, 2)])
    return torch.equal(blocks[:3].cpu(), before)


# ------------------------------------------------------------------------------------------------ models


class Bench:
    """A worker with one model of random weights."""

    def __init__(self, config: PreTrainedConfig, device: str, sizes: Sizes, folder: Path) -> None:
        config.save_pretrained(folder)
        self._sizes, self._said = sizes, list[Any]()
        layout = layout_of(build_skeleton(config, torch.bfloat16, _CPU))
        self.weight_bytes = layout.bytes_
        self._image = _noise_image(layout, torch.device(device))
        extents, first, at = [], 0, 0
        for size in layout.segments:
            extents.append(msg.Extent(at, size, first * sizes.block_bytes))
            first, at = first + -(-size // sizes.block_bytes), at + size
        settings = msg.WorkerSettings(
            "bench",
            device,
            arena_bytes=first * sizes.block_bytes + sizes.kv_bytes,
            block_bytes=sizes.block_bytes,
            host_kv_bytes=4 * sizes.block_bytes,
        )
        self.device = open_device(settings)
        self._free = list(range(first, self.device.arena.numel() // sizes.block_bytes))
        random.Random(0).shuffle(self._free)
        self._worker = Worker(self.device, settings, self._said.append)
        path = f"/proc/{os.getpid()}/fd/{self._image}"
        self._copy = msg.CopyIn(_SERVICE, str(folder), "bfloat16", 0, path, tuple(extents))
        self._steps = self._requests = 0
        self._vocabulary = config.vocab_size
        self.swap_in()

    def close(self) -> None:
        """Give the image back."""
        os.close(self._image)

    def _hear(self, kind: type) -> Any:
        said = [m for m in self._said if not isinstance(m, msg.JobProgress)]
        self._said.clear()
        if len(said) != 1 or not isinstance(said[0], kind):
            raise SystemExit(f"bench_gpu: {said}")
        return said[0]

    def swap_in(self) -> float:
        """Seconds from the first byte to bound parameters."""
        self._worker.handle(self._copy)
        while self._worker.copying:
            self._worker.advance()
        seconds: float = self._hear(msg.CopyDone).seconds
        self.resident = self._worker._resident[_SERVICE]
        return seconds

    def swap_out(self) -> None:
        """Drop the weights, and write over them."""
        self._worker.handle(msg.DropWeights(_SERVICE))
        self.device.arena.fill_(0xFF)

    def _step(self, admit: tuple[msg.Admit, ...], rows: tuple[msg.Row, ...]) -> float:
        self._steps += 1
        self._worker.handle(msg.Step(self._steps, _SERVICE, admit, rows))
        seconds: float = self._hear(msg.StepDone).seconds
        return seconds

    def _admit(self, count: int, prompt: int, tokens: int) -> tuple[list[msg.Admit], list[tuple[int, ...]]]:
        page, rng = self.resident.kv.page, random.Random(1)
        need = page.holding(tokens) * page.blocks
        tables = [tuple(self._free[n * need : (n + 1) * need]) for n in range(count)]
        if len(tables[-1]) < need:
            raise SystemExit("bench_gpu: the arena is too small for these sizes")
        first, self._requests = self._requests, self._requests + count
        return [
            msg.Admit(first + n, tuple(rng.choices(range(self._vocabulary), k=prompt)), prompt, _GREEDY)
            for n in range(count)
        ], tables

    def decode(self, batch: int) -> float:
        """Median seconds of a decode step, some way into the requests."""
        steps = self._sizes.steps
        admits, tables = self._admit(batch, _PROMPT, _PROMPT + steps + 2)
        for admit, table in zip(admits, tables, strict=True):
            self._step((admit,), (msg.Row(admit.request, 0, _PROMPT, True, table),))
        seconds = [
            self._step((), tuple(msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits))
            for n in range(steps + 1)
        ]
        self._worker.handle(msg.Forget(tuple(admit.request for admit in admits)))
        return statistics.median(seconds[1:])

    def prefill(self, tokens: int) -> float:
        """Seconds of one step with a whole prompt; the better of two, as the first finds memory."""
        seconds = []
        for _ in range(2):
            (admit,), (table,) = self._admit(1, tokens, tokens + 1)
            seconds.append(self._step((admit,), (msg.Row(admit.request, 0, tokens, True, table),)))
            self._worker.handle(msg.Forget((admit.request,)))
        return min(seconds)

    @torch.inference_mode()
    def over_a_swap(self) -> tuple[bool, float]:
        """Whether a pass gives the same bits after a swap to the same place, and its seconds then.

        On CUDA a graph is captured before, and replayed.
        """
        where, kv = self.device.torch_device, self.resident.kv
        page = kv.page
        spans = [
            Span(n, 1, 1, self._free[n * page.blocks : (n + 1) * page.blocks])
            for n in range(self._sizes.batches[0])
        ]
        batch = PagedBatch(kv, spans, where)
        ids = torch.arange(len(spans), device=where)[None] % self._vocabulary
        positions = torch.zeros_like(ids)

        def run() -> torch.Tensor:
            with answered_by(batch):
                logits: torch.Tensor = self.resident.model(
                    input_ids=ids, position_ids=positions, use_cache=False
                ).logits
            return logits

        def clear() -> None:  # as the worker does: plain attention reads what was not written yet
            kv.clear([block for span in spans for block in span.table])

        clear()
        before = run()  # also makes what the batch computes once, which a capture may not
        replay = run
        if where.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()

            def replay() -> torch.Tensor:
                graph.replay()
                return captured

        before = replay().clone()
        self.swap_out()
        self.swap_in()
        clear()
        same = torch.equal(replay(), before)
        return same, _best(where, replay)


def _noise_image(layout: Layout, device: torch.device) -> int:
    """A descriptor of shared memory with random weights; norms are ones. Numbers are drawn on the device."""
    descriptor = os.memfd_create("seallmd-bench", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, layout.bytes_)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    memory = torch.from_file(path, shared=True, size=layout.bytes_, dtype=torch.uint8)
    torch.manual_seed(0)
    for place in layout.places:
        target = memory[place.at : place.at + place.bytes_].view(place.dtype).view(place.shape)
        if len(place.shape) < 2:
            target.fill_(1)
        else:
            target.copy_(
                torch.randn(place.shape, dtype=place.dtype, device=device).mul_(place.shape[-1] ** -0.5)
            )
    return descriptor


# --------------------------------------------------------------------------------------------------- run


def check_operations(device: torch.device) -> bool:
    """Print how far each operation is from its reference; whether all are near enough."""
    good = True
    for case in _CASES:
        errors = [attention_error(case, device, dtype) for dtype in (torch.float32, torch.bfloat16)]
        fine = errors[0] < 1e-4 and errors[1] < 2e-2
        good &= fine
        print(
            f"attention, {case.name:22} float32 {errors[0]:.1e}  bfloat16 {errors[1]:.1e}  {_verdict(fine)}"
        )
    share = sampling_agrees(device)
    print(f"sampling: {share:.1%} of rows draw the same  {_verdict(share == 1)}")
    return good and share == 1


def _verdict(fine: bool) -> str:
    return "" if fine else "WRONG"


def bench_model(name: str, bench: Bench, sizes: Sizes, limits: Limits, weights: int) -> bool:
    """Print a model's figures; whether it was right. weights: numbers in its layers."""
    print(f"{name}: {bench.weight_bytes / 1e9:.2f} GB of weights")
    for batch in sizes.batches:
        seconds = bench.decode(batch)
        share = bench.weight_bytes / limits.bandwidth / seconds
        rate = batch / seconds
        print(
            f"  decode {batch:6}: {seconds * 1e3:8.2f} ms, {rate:9.0f} tokens/s, {share:4.0%} of read limit"
        )
    for tokens in sizes.prompts:
        seconds = bench.prefill(tokens)
        share = 2 * tokens * weights / limits.matrix / seconds
        rate = tokens / seconds
        print(
            f"  prefill {tokens:5}: {seconds * 1e3:8.2f} ms, {rate:9.0f} tokens/s, {share:4.0%} of matrices"
        )
    bench.swap_out()
    seconds = bench.swap_in()
    print(f"  swap in: {seconds * 1e3:.1f} ms, {bench.weight_bytes / seconds / 1e9:.1f} GB/s")
    copied = copies_agree(bench.device, sizes.block_bytes)
    bench.swap_out()  # the copies went over weights
    bench.swap_in()
    same, seconds = bench.over_a_swap()
    print(
        f"  after a swap: {seconds * 1e3:.2f} ms {_verdict(same)}; copies of KV {_verdict(copied) or 'right'}"
    )
    return same and copied


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 1 when something computed something else."""
    parser = argparse.ArgumentParser(description="the engine on one GPU, with random weights")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny models and sizes, for tests")
    parser.add_argument("--models", nargs="+", default=list(_SHAPES), help="of those in the source")
    options = parser.parse_args(arguments)
    quiet_libraries()
    begun, device = time.perf_counter(), torch.device(options.device)
    sizes = SMALL if options.tiny else FULL
    good = check_operations(device)
    limits = measure_limits(device, sizes.probe)
    print(f"limits: {limits.bandwidth / 1e9:.0f} GB/s read, {limits.matrix / 1e12:.1f} TFLOP/s in bfloat16")
    for name in options.models:
        fields = _SHAPES[name] | (_TINY if options.tiny else {})
        config = AutoConfig.for_model(name.partition(" ")[0], **fields)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(config, options.device, sizes, Path(folder))
            layers = bench.resident.model.base_model.layers
            weights = sum(p.numel() for p in layers.parameters())
            experts = getattr(config, "num_experts", 0)
            if experts:
                weights = int(weights * config.num_experts_per_tok / experts)  # all but attention
            good &= bench_model(name.partition(" ")[2], bench, sizes, limits, weights)
            bench.close()
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {time.perf_counter() - begun:.0f} s so far", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

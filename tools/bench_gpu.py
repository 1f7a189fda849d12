"""The engine on one GPU, without network and checkpoints: random weights of real shapes.

    python -m tools.bench_gpu                      # under 8 minutes on one large GPU
    python -m tools.bench_gpu --device cpu --tiny  # the same code at a size for tests

No daemon: the worker's own code in this process, driven by the messages that it gets in service. First every
operation of the device, in plain torch and in Triton, against its reference (`tools/gpu_parity.py`), and the
time that it takes (`tools/gpu_times.py`); then, model by model, decode steps by batch (in the ordinary way,
from graphs, and from graphs with the next step sent before the last one's tokens are read; and beside a
short prompt), prefill by length, swapping out and in again, and the same requests from the same graphs after
the swap. Beside the figures stand the device's limits, measured in the same run: a decode step reads every
weight once (a mixture of experts fewer, in small batches), prefill is matrix products. Weights are noise, as
is the text.
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
from seallmd.worker import ops
from seallmd.worker.device import Device, open_device
from seallmd.worker.graphs import Recorder
from seallmd.worker.layout import Layout, layout_of
from seallmd.worker.process import quiet_libraries
from seallmd.worker.skeleton import build_skeleton
from seallmd.worker.worker import Worker
from tools import gpu_times
from tools.gpu_parity import check_operations, copies_agree, verdict

_GREEDY = msg.Sampling(temperature=0.0)
_CPU = torch.device("cpu")
_PROMPT = 64  # tokens before decoding
_CHUNK = 48  # tokens of a prompt beside decoding
_WARM_UP = 3  # steps: as it is, captured, replayed
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
    graph_bytes: int
    probe: int


FULL = Sizes((1, 16, 64, 256), (512, 2048, 8192, 16384), 20, 8 << 30, 2 << 20, 1 << 30, 8192)
SMALL = Sizes((1, 4), (16, 64), 2, 8 << 20, 8192, 1 << 30, 64)


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


def make_recorder(device: Device) -> Recorder | None:
    """What captures graphs."""
    if device.torch_device.type != "cuda":
        return None
    from seallmd.worker.cuda_graphs import CudaRecorder

    return CudaRecorder(device.torch_device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
            graph_bytes=sizes.graph_bytes,
        )
        self.device = open_device(settings)
        self._free = list(range(first, self.device.arena.numel() // sizes.block_bytes))
        random.Random(0).shuffle(self._free)
        self._worker = Worker(self.device, settings, self._said.append, make_recorder(self.device))
        path = f"/proc/{os.getpid()}/fd/{self._image}"
        self._copy = msg.CopyIn(_SERVICE, str(folder), "bfloat16", 0, path, tuple(extents))
        self._steps = self._requests = 0
        self._vocabulary = config.vocab_size
        self.swap_in()

    def close(self) -> None:
        """Give the image and all page-locked memory back."""
        self._worker.handle(msg.DropWeights(_SERVICE))
        self.device.close()
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

    def _send(self, admit: tuple[msg.Admit, ...], rows: tuple[msg.Row, ...]) -> None:
        self._steps += 1
        self._worker.handle(msg.Step(self._steps, _SERVICE, admit, rows))

    def _step(self, admit: tuple[msg.Admit, ...], rows: tuple[msg.Row, ...]) -> msg.StepDone:
        self._send(admit, rows)
        self._worker.land()
        done: msg.StepDone = self._hear(msg.StepDone)
        return done

    def _admit(self, count: int, prompt: int, tokens: int) -> tuple[list[msg.Admit], list[tuple[int, ...]]]:
        assert self.resident.kv is not None, "it is bound"
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

    def _begin(self, batch: int, steps: int) -> list[msg.Admit]:
        """Requests whose prompts have run, with blocks for so many steps more."""
        admits, tables = self._admit(batch, _PROMPT, _PROMPT + steps + 1)
        for admit, table in zip(admits, tables, strict=True):
            self._step((admit,), (msg.Row(admit.request, 0, _PROMPT, True, table),))
        return admits

    def decode(self, batch: int, graphs: bool) -> tuple[float, list[tuple[int, ...]]]:
        """Median seconds of a decode step, and the tokens of every one. graphs: whether they may be used."""
        steps, mine = self._sizes.steps, self.resident.graphs
        admits = self._begin(batch, _WARM_UP + steps)
        self.resident.graphs = mine if graphs else None
        done = [
            self._step((), tuple(msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits))
            for n in range(_WARM_UP + steps)
        ]
        self.resident.graphs = mine
        self._worker.handle(msg.Forget(tuple(admit.request for admit in admits)))
        return statistics.median(d.seconds for d in done[_WARM_UP:]), [d.tokens for d in done]

    def mixed(self, batch: int, chunk: int, graphs: bool) -> float:
        """Median seconds of a decode step that has a prompt of `chunk` tokens in it too."""
        steps, mine = self._sizes.steps, self.resident.graphs
        admits, seconds = self._begin(batch, _WARM_UP + steps), []
        self.resident.graphs = mine if graphs else None
        for n in range(_WARM_UP + steps):
            rows = [msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits]
            (other,), (table,) = self._admit(1, chunk, chunk + 1)
            done = self._step((other,), (*rows, msg.Row(other.request, 0, chunk, True, table)))
            seconds.append(done.seconds)
            self._worker.handle(msg.Forget((other.request,)))
        self.resident.graphs = mine
        self._worker.handle(msg.Forget(tuple(admit.request for admit in admits)))
        return statistics.median(seconds[_WARM_UP:])

    def decode_ahead(self, batch: int) -> float:
        """Seconds of a decode step where each is sent before the tokens of the last are read."""
        steps = self._sizes.steps
        admits = self._begin(batch, _WARM_UP + steps)
        begun = 0.0
        for n in range(_WARM_UP + steps):
            if n == _WARM_UP:
                self._worker.land()
                begun = time.perf_counter()
            self._send((), tuple(msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits))
        self._worker.land()
        seconds = (time.perf_counter() - begun) / steps
        self._said.clear()
        self._worker.handle(msg.Forget(tuple(admit.request for admit in admits)))
        return seconds

    def prefill(self, tokens: int) -> float:
        """Seconds of one step with a whole prompt; the better of two, as the first finds memory."""
        seconds = []
        for _ in range(2):
            (admit,), (table,) = self._admit(1, tokens, tokens + 1)
            done = self._step((admit,), (msg.Row(admit.request, 0, tokens, True, table),))
            seconds.append(done.seconds)
            self._worker.handle(msg.Forget((admit.request,)))
        return min(seconds)

    def over_a_swap(self) -> tuple[bool, int]:
        """Whether the same requests draw the same after a swap to the same place, and how many graphs it
        left."""
        batch, mine = self._sizes.batches[0], self.resident.graphs
        _, before = self.decode(batch, graphs=True)
        kept = 0 if mine is None else len(mine)
        self.swap_out()
        self.swap_in()
        _, after = self.decode(batch, graphs=True)
        same = after == before and (mine is None or len(mine) == kept)
        return same, kept


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


def bench_model(name: str, bench: Bench, sizes: Sizes, limits: Limits, weights: int) -> bool:
    """Print a model's figures; whether it was right. weights: numbers in its layers."""
    print(f"{name}: {bench.weight_bytes / 1e9:.2f} GB of weights")
    replaced = ", ".join(f"{count} {kind}" for kind, count in bench.resident.operations())
    print(f"  replaced: {replaced or 'nothing'}")
    for batch in sizes.batches:
        plain, expected = bench.decode(batch, graphs=False)
        graphs, tokens = bench.decode(batch, graphs=True)
        ahead = bench.decode_ahead(batch)
        share = bench.weight_bytes / limits.bandwidth / ahead
        pairs = [pair for x, y in zip(expected, tokens, strict=True) for pair in zip(x, y, strict=True)]
        same = statistics.mean(a == b for a, b in pairs)
        rate = batch / ahead
        print(
            f"  decode {batch:6}: {plain * 1e3:8.2f} ms, from graphs {graphs * 1e3:.2f}, two deep "
            f"{ahead * 1e3:.2f}: {rate:9.0f} tokens/s, {share:4.0%} of read limit; {same:.1%} the same tokens"
        )
    batch = sizes.batches[0]
    plain, graphs = (bench.mixed(batch, _CHUNK, used) * 1e3 for used in (False, True))
    print(f"  decode {batch} beside a prompt of {_CHUNK} tokens: {plain:.2f} ms, from graphs {graphs:.2f}")
    for prompt in sizes.prompts:
        seconds = bench.prefill(prompt)
        share = 2 * prompt * weights / limits.matrix / seconds
        rate = prompt / seconds
        print(
            f"  prefill {prompt:5}: {seconds * 1e3:8.2f} ms, {rate:9.0f} tokens/s, {share:4.0%} of matrices"
        )
    bench.swap_out()
    seconds = bench.swap_in()
    print(f"  swap in: {seconds * 1e3:.1f} ms, {bench.weight_bytes / seconds / 1e9:.1f} GB/s")
    copied = copies_agree(bench.device, sizes.block_bytes)
    bench.swap_out()  # the copies went over weights
    bench.swap_in()
    same, kept = bench.over_a_swap()
    print(
        f"  after a swap: {kept} graphs kept, tokens {verdict(same) or 'the same'}; "
        f"copies of KV {verdict(copied) or 'right'}"
    )
    return same and copied


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 1 when something computed something else."""
    parser = argparse.ArgumentParser(description="the engine on one GPU, with random weights")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny models and sizes, for tests")
    parser.add_argument("--models", nargs="+", default=list(_SHAPES), help="of those in the source")
    parser.add_argument("--cache", default="~/.cache/seallmd", help="where compiled operations are kept")
    options = parser.parse_args(arguments)
    quiet_libraries()
    begun, device = time.perf_counter(), torch.device(options.device)
    sizes = SMALL if options.tiny else FULL
    if device.type == "cuda":
        torch.cuda.set_device(device)
        ops.start_kernels(device, Path(options.cache).expanduser(), print)
    print(f"operations: {ops.summary()}")
    good = check_operations(device, ops.gpu_kernels())
    with torch.inference_mode():
        gpu_times.time_operations(device, ops.gpu_kernels(), gpu_times.FULL)
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
        del bench, layers  # whose parameters lie in the arena
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {time.perf_counter() - begun:.0f} s so far", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

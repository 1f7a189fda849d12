"""The engine on one GPU, without network and checkpoints: random weights of real shapes.

    python -m tools.bench_gpu                      # under 8 minutes on one large GPU
    python -m tools.bench_gpu --device cpu --tiny  # the same code at a size for tests

No daemon: the worker's own code in this process, driven by the messages that it gets in service. First every
operation of the device, in plain torch and in Triton, against its reference (`tools/gpu_parity.py`), and the
time that it takes (`tools/gpu_times.py`); then, model by model, decode steps by batch (in the ordinary way,
from graphs, and from graphs with the next step sent before the last one's tokens are read; and beside a
short prompt), prefill by length, swapping out and in again, and the same requests from the same graphs after
the swap. Beside the figures stand the device's limits, measured in the same run: a decode step reads every
weight once (a mixture of experts fewer, in small batches), prefill is matrix products, a swap is a copy from
page-locked memory. Weights are noise, as is the text.

On a GPU all of it runs in a process of its own, and what is left goes on in another where that ends early.
Each figure is printed as soon as it is there, and one that cannot be had costs no other.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from tools.gpu_times import Limits, measure_limits
from tools.sections import run_here, run_in_processes, survives

_GREEDY = msg.Sampling(temperature=0.0)
_CPU = torch.device("cpu")
_CONTEXT = 32768  # of a request at most: a model's attention is tried as far as it gets
_PROMPT = 64  # tokens before decoding
_CHUNK = 48  # tokens of a prompt beside decoding
_WARM_UP = 3  # steps: as it is, captured, replayed
_SERVICE = "bench"
_OPERATIONS = "operations"
_SECTION_SECONDS = 240  # the first compiles what there is to compile

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


def make_recorder(device: Device) -> Recorder | None:
    """What captures graphs."""
    if device.torch_device.type != "cuda":
        return None
    from seallmd.worker.cuda_graphs import CudaRecorder

    return CudaRecorder(device.torch_device)


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
        context = min(config.max_position_embeddings, _CONTEXT)
        self._copy = msg.CopyIn(_SERVICE, str(folder), "bfloat16", context, path, tuple(extents))
        self._steps = self._requests = 0
        self._vocabulary = config.vocab_size
        try:
            self.swap_in()
        except BaseException:
            self.close()  # page locks end before their mappings, also where others go on
            raise

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

    @contextmanager
    def _graphs(self, used: bool) -> Iterator[None]:
        """Whether steps inside may use them."""
        mine = self.resident.graphs
        self.resident.graphs = mine if used else None
        try:
            yield
        finally:
            self.resident.graphs = mine

    def decode(self, batch: int, graphs: bool) -> tuple[float, list[tuple[int, ...]]]:
        """Median seconds of a decode step, and the tokens of every one. graphs: whether they may be used."""
        steps = self._sizes.steps
        admits = self._begin(batch, _WARM_UP + steps)
        with self._graphs(graphs):
            done = [
                self._step((), tuple(msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits))
                for n in range(_WARM_UP + steps)
            ]
        self._worker.handle(msg.Forget(tuple(admit.request for admit in admits)))
        return statistics.median(d.seconds for d in done[_WARM_UP:]), [d.tokens for d in done]

    def mixed(self, batch: int, chunk: int, graphs: bool) -> float:
        """Median seconds of a decode step that has a prompt of `chunk` tokens in it too."""
        steps = self._sizes.steps
        admits, seconds = self._begin(batch, _WARM_UP + steps), []
        with self._graphs(graphs):
            for n in range(_WARM_UP + steps):
                rows = [msg.Row(admit.request, _PROMPT + n, 1, True) for admit in admits]
                (other,), (table,) = self._admit(1, chunk, chunk + 1)
                done = self._step((other,), (*rows, msg.Row(other.request, 0, chunk, True, table)))
                seconds.append(done.seconds)
                self._worker.handle(msg.Forget((other.request,)))
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
    parts: list[tuple[str, Callable[[], bool]]] = [
        *((f"decode {batch}", partial(_decode, bench, batch, limits)) for batch in sizes.batches),
        ("decode beside a prompt", partial(_mixed, bench, sizes.batches[0])),
        *(
            (f"prefill {prompt}", partial(_prefill, bench, prompt, limits, weights))
            for prompt in sizes.prompts
        ),
        ("swap in", partial(_swap, bench, limits)),
        ("after a swap", partial(_over_a_swap, bench, sizes.block_bytes)),
    ]
    right = [survives(part, run) for part, run in parts]  # all of them, whatever the first gives
    return all(right)


def _decode(bench: Bench, batch: int, limits: Limits) -> bool:
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
    return True


def _mixed(bench: Bench, batch: int) -> bool:
    plain, graphs = (bench.mixed(batch, _CHUNK, used) * 1e3 for used in (False, True))
    print(f"  decode {batch} beside a prompt of {_CHUNK} tokens: {plain:.2f} ms, from graphs {graphs:.2f}")
    return True


def _prefill(bench: Bench, prompt: int, limits: Limits, weights: int) -> bool:
    seconds = bench.prefill(prompt)
    share = 2 * prompt * weights / limits.matrix / seconds
    rate = prompt / seconds
    print(f"  prefill {prompt:5}: {seconds * 1e3:8.2f} ms, {rate:9.0f} tokens/s, {share:4.0%} of matrices")
    return True


def _swap(bench: Bench, limits: Limits) -> bool:
    bench.swap_out()
    seconds = bench.swap_in()
    rate = bench.weight_bytes / seconds
    print(
        f"  swap in: {seconds * 1e3:.1f} ms, {rate / 1e9:.1f} GB/s, {rate / limits.host:4.0%} of host copies"
    )
    return True


def _over_a_swap(bench: Bench, block_bytes: int) -> bool:
    copied = copies_agree(bench.device, block_bytes)
    bench.swap_out()  # the copies went over weights
    bench.swap_in()
    same, kept = bench.over_a_swap()
    print(
        f"  after a swap: {kept} graphs kept, tokens {verdict(same) or 'the same'}; "
        f"copies of KV {verdict(copied) or 'right'}"
    )
    return same and copied


def _bench(name: str, device: str, sizes: Sizes, limits: Limits, tiny: bool) -> bool:
    """One model, from the beginning to the end."""
    fields = _SHAPES[name] | (_TINY if tiny else {})
    config = AutoConfig.for_model(name.partition(" ")[0], **fields)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, device, sizes, Path(folder))
        weights = sum(p.numel() for p in bench.resident.model.base_model.layers.parameters())
        experts = getattr(config, "num_experts", 0)
        if experts:
            weights = int(weights * config.num_experts_per_tok / experts)  # all but attention
        try:
            return bench_model(name.partition(" ")[2], bench, sizes, limits, weights)
        finally:
            bench.close()


def _operations(device: torch.device) -> bool:
    good = check_operations(device, ops.gpu_kernels())
    with torch.inference_mode():
        return gpu_times.time_operations(device, ops.gpu_kernels(), gpu_times.FULL) and good


def _run(options: argparse.Namespace, sections: Sequence[str]) -> bool:
    """Sections in this process."""
    quiet_libraries()
    begun, device = time.perf_counter(), torch.device(options.device)
    sizes, cuda = SMALL if options.tiny else FULL, device.type == "cuda"
    if cuda:
        faulthandler.dump_traceback_later(_SECTION_SECONDS, exit=True)  # and then for each section anew
        torch.cuda.set_device(device)
        ops.start_kernels(device, Path(options.cache), print)
    print(f"operations: {ops.summary()}")
    limits = measure_limits(device, sizes.probe)
    print(
        f"limits: {limits.bandwidth / 1e9:.0f} GB/s read, {limits.matrix / 1e12:.1f} TFLOP/s in bfloat16, "
        f"{limits.host / 1e9:.1f} GB/s from the host"
    )

    def run(name: str) -> bool:
        if name == _OPERATIONS:
            return _operations(device)
        return _bench(name, options.device, sizes, limits, options.tiny)

    def told(right: bool) -> None:
        gc.collect()  # what lay in the arena
        if cuda:
            torch.cuda.empty_cache()
        print(f"  {time.perf_counter() - begun:.0f} s so far", flush=True)
        if options.report:
            with open(options.report, "a") as file:
                file.write("good\n" if right else "bad\n")

    return run_here(sections, run, told, _SECTION_SECONDS if cuda else 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 1 when something computed something else, or did not run."""
    parser = argparse.ArgumentParser(description="the engine on one GPU, with random weights")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny models and sizes, for tests")
    parser.add_argument("--models", nargs="+", default=list(_SHAPES), help="of those in the source")
    kept = Path(tempfile.gettempdir()) / "seallmd-bench"
    parser.add_argument("--cache", default=str(kept), help="where compiled operations are kept")
    parser.add_argument("--seconds", type=float, default=570, help="for all of it")
    parser.add_argument("--sections", nargs="+", help=argparse.SUPPRESS)  # of this process; with a report
    parser.add_argument("--report", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sections:
        return 0 if _run(options, options.sections) else 1
    sections = [_OPERATIONS, *options.models]
    if torch.device(options.device).type != "cuda":
        return 0 if _run(options, sections) else 1
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        command = [sys.executable, "-u", "-m", "tools.bench_gpu", "--report", str(report)]
        command += [
            "--device",
            options.device,
            "--cache",
            options.cache,
            *(["--tiny"] if options.tiny else []),
        ]
        good = run_in_processes(
            sections, lambda left: [*command, "--sections", *left], report, options.seconds
        )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

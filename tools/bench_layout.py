"""The two layouts of KV inside blocks, merged and split (`seallmd.worker.kv`), at several block sizes.

    python -m tools.bench_layout models/smollm2-135m-instruct models/gemma-3-270m

One model, one copy of its weights, one thread by default; the layouts take turns, so that a machine which
drifts or is shared harms them alike. Speed: the least CPU time (with one thread, the time it takes when
nobody disturbs it) of a decode step, of all turns, at each batch and context, and of a prefill; as a ratio to
the first line (above 1: slower). KV of a decode's context is whatever lies there: its values cost no time.

Memory: over requests with lengths like ShareGPT's, the share of allotted bytes that is never written, how
many such requests fit into a GiB, and the blocks in a table of 1,024 tokens. "outside windows": the share of
written bytes that sliding layers no longer look at by the end of a request, which a layout with a layer to
itself could give back.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from seallmd.core import messages as msg
from seallmd.core.shapes import ModelShape
from seallmd.sim.workload import Lengths
from seallmd.worker.attention import run_recorded
from seallmd.worker.kv import Page, page_of
from seallmd.worker.process import quiet_libraries
from tools.bench_engine import Engine

_REQUESTS = 2000
_GREEDY = msg.Sampling(temperature=0.0)
_FIRST = 1 << 30  # ids of requests that no other part of the benchmark uses


class Layout(NamedTuple):
    """What is compared."""

    name: str
    block_bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.block_bytes >> 10} KiB"


class Memory(NamedTuple):
    """What a layout costs. unused: share of allotted bytes. per_gib: requests. blocks: of a long table."""

    unused: float
    per_gib: float
    blocks: int


def memory_of(shape: ModelShape, layout: Layout, lengths: list[int]) -> Memory:
    """Of requests with so many tokens at their end."""
    page = page_of(shape.layers, shape.itemsize, layout.block_bytes, layout.name)
    allotted = sum(page.holding(tokens) * page.blocks * layout.block_bytes for tokens in lengths)
    used = sum(lengths) * shape.kv_bytes_per_token
    table = page.holding(1024) * page.blocks
    return Memory(1 - used / allotted, (1 << 30) * len(lengths) / allotted, table)


def outside_windows(shape: ModelShape, windows: list[int | None], lengths: list[int]) -> float:
    """Share of the KV bytes of such requests that lies outside its layer's window. windows: by layer."""
    sizes = [layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in shape.layers]
    outside = sum(
        size * sum(max(0, tokens - window) for tokens in lengths)
        for size, window in zip(sizes, windows, strict=True)
        if window is not None
    )
    return outside / (sum(sizes) * sum(lengths))


def decode(engine: Engine, streams: int, context: int, steps: int) -> float:
    """CPU seconds of the quickest decode step of `streams` requests around `context` tokens."""
    ids = range(_FIRST, _FIRST + streams)
    need = engine.page.holding(context + steps) * engine.page.blocks
    tables = [tuple(engine.free.pop() for _ in range(need)) for _ in ids]
    prompt = tuple(random.Random(1).choices(range(100, 2000), k=context))
    admits = tuple(msg.Admit(request, prompt, context, _GREEDY) for request in ids)
    engine.step(
        admits,
        tuple(msg.Row(i, context - 1, 1, True, table) for i, table in zip(ids, tables, strict=True)),
    )
    seconds = []
    for n in range(steps - 1):
        rows = tuple(msg.Row(request, context + n, 1, True) for request in ids)
        begun = time.process_time()
        engine.step((), rows)
        seconds.append(time.process_time() - begun)
    engine.free += [block for table in tables for block in table]
    return min(seconds)


def prefill(engine: Engine, tokens: int) -> float:
    """CPU seconds of one prompt of so many tokens, in one step."""
    table = tuple(engine.free.pop() for _ in range(engine.page.holding(tokens) * engine.page.blocks))
    prompt = tuple(random.Random(2).choices(range(100, 2000), k=tokens))
    begun = time.process_time()
    engine.step((msg.Admit(_FIRST, prompt, tokens, _GREEDY),), (msg.Row(_FIRST, 0, tokens, True, table),))
    seconds = time.process_time() - begun
    engine.free += table
    return seconds


def bench(directory: Path, options: argparse.Namespace, cache: Path) -> None:
    """Measure and print one model."""
    most = max(options.batches) * (max(options.contexts) + options.steps)
    engine = Engine(
        directory, options.dtype, 0, cache, compiled=not options.torch, kv_bytes=options.kv_mib << 20
    )
    shape = engine.shape
    layouts = [Layout(name, kib << 10) for kib in options.blocks for name in ("merged", "split")]
    layouts = [layout for layout in layouts if _fits(shape, layout, options, most)]
    kinds = [(batch, context) for context in options.contexts for batch in options.batches]
    found: dict[Layout, list[list[float]]] = {
        layout: [[] for _ in range(len(kinds) + 1)] for layout in layouts
    }
    for turn in range(options.turns):
        for layout in layouts if turn % 2 == 0 else reversed(layouts):
            engine.lay_out(*layout)
            for at, (batch, context) in enumerate(kinds):
                found[layout][at].append(decode(engine, batch, context, options.steps))
            found[layout][-1].append(prefill(engine, options.prompt))
    lengths = _lengths(shape.context)
    calls, _ = run_recorded(engine.model, tokens=1)
    outside = outside_windows(shape, [call.window for call in calls], lengths)
    print(f"\n{directory.name}, {shape.dtype}, {engine.what}, {options.threads} threads")
    print(
        f"{shape.kv_bytes_per_token} bytes of KV per token in {len(shape.layers)} layers; requests of"
        f" {statistics.mean(lengths):.0f} tokens on average; outside windows: {outside:.0%}"
    )
    heads = [f"{batch} x {context}" for batch, context in kinds] + [f"prefill {options.prompt}"]
    print(
        f"{'':16}" + "".join(f"{head:>18}" for head in heads) + "   tokens x blocks  unused  per GiB  table"
    )
    base = [min(times) for times in found[layouts[0]]]
    for layout, columns in found.items():
        _line(shape, layout, [min(times) for times in columns], base, lengths)


def _line(
    shape: ModelShape, layout: Layout, best: list[float], base: list[float], lengths: list[int]
) -> None:
    page = page_of(shape.layers, shape.itemsize, layout.block_bytes, layout.name)
    memory = memory_of(shape, layout, lengths)
    text = f"{layout!s:16}"
    for seconds, reference in zip(best, base, strict=True):
        text += f"{seconds * 1e3:10.2f} ms {seconds / reference:4.2f}"
    text += f"   {page.tokens:6} x {page.blocks:<6}"
    text += f"  {memory.unused:6.1%}  {memory.per_gib:7.1f}  {memory.blocks:5}"
    print(text, flush=True)


def _fits(shape: ModelShape, layout: Layout, options: argparse.Namespace, tokens: int) -> bool:
    """Whether a block holds a token at all, and the arena what is to be measured; says why not."""
    try:
        page: Page = page_of(shape.layers, shape.itemsize, layout.block_bytes, layout.name)
    except ValueError as error:
        print(f"{layout}: {error}")
        return False
    streams = max(options.batches)
    bytes_ = streams * page.holding(tokens // streams) * page.blocks * layout.block_bytes
    if bytes_ > options.kv_mib << 20:
        print(f"{layout}: {bytes_ >> 20} MiB of KV are needed")
        return False
    return True


def _lengths(context: int) -> list[int]:
    prompts, outputs = Lengths().draw(np.random.default_rng(5), _REQUESTS)
    return [min(context, p + o) for p, o in zip(prompts, outputs, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="layouts of KV inside blocks")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 16, 64, 256, 2048], help="KiB")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-mib", type=int, default=1536, help="MiB of the arena for KV")
    parser.add_argument("--torch", action="store_true", help="without the compiled operations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        for model in options.models:
            bench(model, options, Path(cache))


if __name__ == "__main__":
    main()

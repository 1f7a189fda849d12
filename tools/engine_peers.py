"""Other engines on the work of `bench_engine`: transformers, llama.cpp, vLLM.

Owns how each is asked and timed. Must not know what their figures are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

STEP_TOKENS = 512


class Times(NamedTuple):
    """Seconds of one run: of the whole prefill, of one decode step (median). Decode nan: not told apart."""

    prefill: float
    decode: float
    whole: float


Runner = Callable[[list[list[int]], int], Times]  # prompts, and how many tokens to draw behind each


def transformers_runner(directory: Path) -> Runner:
    """`generate` of a static batch in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def run(prompts: list[list[int]], new: int) -> Times:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
            )
        return Times(float("nan"), float("nan"), time.perf_counter() - started)

    return run


def llama_runner(program: Path, gguf: Path, threads: int) -> Runner:
    """llama.cpp's own llama-batched-bench: as many streams, prompts and answers as long, by its clock."""

    def run(prompts: list[list[int]], new: int) -> Times:
        streams, prompt = len(prompts), len(prompts[0])
        asked = {"-npp": prompt, "-ntg": new, "-npl": streams, "-c": streams * (prompt + new)}
        command = [str(program), "-m", str(gguf), "-t", str(threads), "-tb", str(threads)]
        command += [str(part) for pair in asked.items() for part in pair]
        command += ["-ub", str(STEP_TOKENS), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        return Times(found["t_pp"], found["t_tg"] / new, found["t_pp"] + found["t_tg"])

    return run


@contextmanager
def vllm_runner(python: Path, model: Path, dtype: str, threads: int, length: int) -> Iterator[Runner]:
    """vLLM under an interpreter that has it, one process for as long as this lasts (`tools/vllm_side.py`).

    length: the most tokens of a request.
    """
    side = Path(__file__).with_name("vllm_side.py")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"}
    with subprocess.Popen(
        [python, side, model, dtype, str(length)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **binding},
    ) as process:
        asked, said = process.stdin, process.stdout
        assert asked is not None
        assert said is not None
        if "ready" not in said.readline():
            raise SystemExit(f"bench_engine: vLLM does not start: {python} {side} {model} {dtype} {length}")

        def run(prompts: list[list[int]], new: int) -> Times:
            print(json.dumps({"prompts": prompts, "new": new}), file=asked, flush=True)
            return Times(float("nan"), float("nan"), json.loads(said.readline())["seconds"])

        yield run
        asked.close()

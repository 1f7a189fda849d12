"""Daemons that several tests share, and what transformers itself says (the reference)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.e2e.daemon import GEMMA, MODELS, SMOL, Daemon, service

NEW_TOKENS = 16
POOLINGS = {SMOL: "mean", GEMMA: "last"}
WORDS = [
    *("The", "history", "of", "the", "river", "begins", "in", "mountains", "where", "rain", "collects"),
    *("into", "small", "streams", "and", "then", "flows", "past", "old", "towns", "whose", "people"),
    *("built", "mills", "bridges", "gardens", "along", "both", "banks", "for", "many", "years"),
]


def prompts() -> list[str]:
    """Twenty prompts: shared beginnings, very short ones, one much longer than a prefill chunk."""
    rng = random.Random(7)
    shared = "Answer the following question as briefly as you can. "
    questions = ["What is the capital of France?", "Why is the sky blue?", "Who wrote Hamlet?", "2 + 2 ="]
    text = [shared + question for question in questions]
    text += ["Once upon a time", "def fibonacci(n):", "日本の首都は", "Ein Haus am", "1, 2, 3, 4,", "A"]
    text += [" ".join(rng.choices(WORDS, k=rng.randint(5, 90))) for _ in range(9)]
    return [*text, " ".join(rng.choices(WORDS, k=1100))]


def short_prompts() -> list[str]:
    """All but the long one."""
    return prompts()[:-1]


@pytest.fixture(scope="session")
def reference() -> dict[str, list[list[int]]]:
    """Greedy continuations by `generate`, float32, by model: the long prompt alone, the others together."""
    torch.set_num_threads(2)
    return {name: _generate(name) for name in (SMOL, GEMMA)}


def _generate(name: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    found = []
    for together in (short_prompts(), prompts()[-1:]):
        inputs = tokenizer(together, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found += [_until_the_end(row[inputs.input_ids.shape[1] :].tolist(), model) for row in out]
    return found


def _until_the_end(tokens: list[int], model: PreTrainedModel) -> list[int]:
    """Behind its end an answer is padded for as long as others of its batch go on."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    ends = [at + 1 for at, token in enumerate(tokens) if token in stops]
    return tokens[: min(ends, default=len(tokens))]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Two CPU devices, both models and a third service, room for all but one; one device per service."""
    config = '[devices]\nkind = "cpu"\ncpu_workers = 2\nmemory = "1536 MiB"\n'
    config += "[policy]\nstep_tokens = 256\nreplicate = false\n[replacement]\nenabled = false\n"
    config += service(SMOL, SMOL, dtype="float32", preload=True, pooling=POOLINGS[SMOL])
    config += service(GEMMA, GEMMA, dtype="float32", pooling=POOLINGS[GEMMA])
    config += service("smol-b", SMOL, dtype="float32", context=1024)
    config += service("broken", "no-such-model")
    yield from running(Daemon(tmp_path_factory.mktemp("daemon"), config))


@pytest.fixture
def small_daemon(tmp_path: Path, model: str, host_kv: str) -> Iterator[Daemon]:
    """One device with room for little more than one of `short_prompts` beside the model's weights: two that
    meet preempt each other, and they are in flight for several steps each, so they meet on any machine."""
    memory = {SMOL: "536 MiB", GEMMA: "1034 MiB"}[model]
    config = f'[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "{memory}"\n'
    config += f'host_kv = "{host_kv}"\n'
    config += "[policy]\nstep_tokens = 32\n"
    config += service(model, model, dtype="float32", preload=True, context=160, pooling=POOLINGS[model])
    yield from running(Daemon(tmp_path, config))


def running(daemon: Daemon) -> Iterator[Daemon]:
    """Until the test is over; it has to end well."""
    try:
        daemon.wait_healthy()
        yield daemon
        assert daemon.stop() == 0, daemon.log.read_text()
    finally:
        daemon.kill()

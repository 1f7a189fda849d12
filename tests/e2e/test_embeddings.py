"""Embeddings of real models equal what transformers' own hidden states come to, in float32.

Whatever is done to the requests: batched with each other and with such that generate, prefilled in chunks,
preempted and started over.
"""

from __future__ import annotations

import asyncio

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import NEW_TOKENS, POOLINGS, prompts, short_prompts
from tests.e2e.daemon import GEMMA, MODELS, SMOL, Daemon

Reference = dict[str, list[list[int]]]
Vectors = dict[str, np.ndarray]
both = pytest.mark.parametrize("model", [SMOL, GEMMA])


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """[prompts, hidden size] by model, of length 1: the mean, or the last, of transformers' last hidden
    states behind the final norm; one prompt at a time."""
    return {name: np.stack([_vector(*loaded, prompt) for prompt in prompts()]) for name, loaded in _models()}


def _models() -> list[tuple[str, tuple[object, ...]]]:
    return [
        (
            name,
            (
                AutoTokenizer.from_pretrained(MODELS / name),
                AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval(),
                pooling,
            ),
        )
        for name, pooling in POOLINGS.items()
    ]


@torch.inference_mode()
def _vector(tokenizer: object, model: object, pooling: str, prompt: str) -> np.ndarray:
    ids = tokenizer(prompt, return_tensors="pt").input_ids  # type: ignore[operator]
    states = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][0]  # type: ignore[operator]
    vector = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
    return vector / np.linalg.norm(vector)


def same(found: object, expected: np.ndarray) -> None:
    """As vectors of length 1: cosines of 1, and no element off."""
    array = np.asarray(found)
    assert array.shape == expected.shape
    assert np.linalg.norm(array, axis=-1) == pytest.approx(1.0, abs=1e-6)
    assert (array * expected).sum(-1).min() > 1 - 1e-6
    assert np.abs(array - expected).max() < 1e-4


@both
def test_parity(daemon: Daemon, vectors: Vectors, model: str) -> None:
    """All texts in one request, one of them longer than a prefill chunk; then again, when prefixes are there,
    in the client's own format (base64)."""
    client = daemon.client()
    for encoding in ({"encoding_format": "float"}, {}):
        answer = client.embeddings.create(model=model, input=prompts(), **encoding)  # type: ignore[arg-type]
        same([entry.embedding for entry in answer.data], vectors[model])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 1100


async def _mixed(daemon: Daemon, model: str, texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
    """Every text generates and is embedded at the same time, all of them at once."""
    async with daemon.async_client() as client:

        async def generate(prompt: str) -> list[int]:
            answer = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            return answer.choices[0].token_ids  # type: ignore[attr-defined, no-any-return]

        async def embed(prompt: str) -> list[float]:
            answer = await client.embeddings.create(model=model, input=prompt)
            return answer.data[0].embedding

        work = [asyncio.gather(generate(prompt), embed(prompt)) for prompt in texts]
        tokens, embedded = zip(*await asyncio.gather(*work), strict=True)
        return list(tokens), list(embedded)


@both
def test_beside_generation(daemon: Daemon, reference: Reference, vectors: Vectors, model: str) -> None:
    """Both kinds of rows in one step: neither changes the other."""
    tokens, embedded = asyncio.run(_mixed(daemon, model, prompts()))
    assert tokens == reference[model]
    same(embedded, vectors[model])


@pytest.mark.parametrize(("model", "host_kv"), [(SMOL, "0 B"), (SMOL, "64 MiB")], ids=lambda value: value)
def test_after_forced_preemption(
    small_daemon: Daemon, reference: Reference, vectors: Vectors, model: str, host_kv: str
) -> None:
    """Too little memory for all: what was pooled before a preemption counts once.

    Who meets whom depends on when requests come, so they come until somebody was in another's way.
    """
    texts = short_prompts()
    for _ in range(8):
        tokens, embedded = asyncio.run(_mixed(small_daemon, model, texts))
        assert tokens == reference[model][: len(texts)]
        same(embedded, vectors[model][: len(texts)])
        status = small_daemon.service(model)
        if status["saves" if host_kv != "0 B" else "preemptions"] > 0:
            break
    assert status["preemptions"] > 0, "nothing was preempted: the test shows nothing"
    assert (status["saves"] > 0) == (host_kv != "0 B")


def test_ollama(daemon: Daemon, vectors: Vectors) -> None:
    """The same vectors; the older endpoint's are not scaled."""
    texts = prompts()[:3]
    answer = httpx.post(f"{daemon.url}/api/embed", json={"model": SMOL, "input": texts}, timeout=60).json()
    same(answer["embeddings"], vectors[SMOL][:3])
    body = {"model": SMOL, "prompt": texts[0]}
    older = httpx.post(f"{daemon.url}/api/embeddings", json=body, timeout=60).json()["embedding"]
    assert np.linalg.norm(older) > 2
    same([older / np.linalg.norm(older)], vectors[SMOL][:1])


def test_a_service_without_pooling_says_what_to_write(daemon: Daemon) -> None:
    """The remedy is in the error."""
    with pytest.raises(openai.BadRequestError, match=r'pooling = \\?"mean\\?" or \\?"last'):
        daemon.client().embeddings.create(model="smol-b", input="x")

"""POST /v1/embeddings and Ollama's two: shapes, pooling, limits, what is refused, and what is left behind."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from seallmd.api import embedding
from seallmd.core.events import Finish
from tests.api.engine_double import FakeEngine, hidden, view


@pytest.fixture(autouse=True)
def services(engine: FakeEngine, model: Path) -> None:
    """ "e" gives means, "l" the last token's state, "m" nothing."""
    for name, pooling in (("e", "mean"), ("l", "last")):
        engine.views[name] = view(name, model, pooling=pooling)


async def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


def mean(tokens: list[int]) -> np.ndarray:
    return np.mean([hidden(token) for token in tokens], axis=0)


def unit(vector: Any) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


async def test_the_official_client(client: AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    """Texts in their order, special tokens leading; it asks for base64 by itself. Usage counts all."""
    texts = ["hello", "the quick brown fox"]
    answer = await client.embeddings.create(model="e", input=texts)
    encoded = [tokenizer.encode(text).ids for text in texts]
    assert [entry.index for entry in answer.data] == [0, 1]
    for entry, tokens in zip(answer.data, encoded, strict=True):
        assert entry.embedding == pytest.approx(unit(mean(tokens)), abs=1e-6)
    total = sum(map(len, encoded))
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("e", total, total)
    assert [generation.max_tokens for generation in engine.submitted] == [0, 0]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [([5, 6, 7], [[5, 6, 7]]), ([[5, 6], [9]], [[5, 6], [9]]), ("hello", None), (["hello"], None)],
)
async def test_forms_of_input(
    url: str, tokenizer: Tokenizer, given: Any, prompts: list[list[int]] | None
) -> None:
    """A text, ids, or lists of either."""
    status, answer = await post(url + "/v1/embeddings", {"model": "e", "input": given})
    assert status == 200
    for entry, tokens in zip(answer["data"], prompts or [tokenizer.encode("hello").ids], strict=True):
        assert entry["object"] == "embedding"
        assert entry["embedding"] == pytest.approx(unit(mean(tokens)), abs=1e-6)


async def test_last_token(url: str) -> None:
    """Only its state counts."""
    _, answer = await post(url + "/v1/embeddings", {"model": "l", "input": [5, 6, 7], "normalize": False})
    assert answer["data"][0]["embedding"] == hidden(7)


async def test_formats_are_the_same_numbers(url: str) -> None:
    """base64 is of little-endian float32."""
    body = {"model": "e", "input": [5, 6, 7]}
    _, numbers = await post(url + "/v1/embeddings", {**body, "encoding_format": "float"})
    _, packed = await post(url + "/v1/embeddings", {**body, "encoding_format": "base64"})
    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert unpacked.tolist() == numbers["data"][0]["embedding"]


async def test_dimensions(url: str) -> None:
    """The first ones, of length 1 again."""
    body = {"model": "e", "input": [5, 6, 7], "dimensions": 2}
    _, answer = await post(url + "/v1/embeddings", body)
    assert answer["data"][0]["embedding"] == pytest.approx(unit(mean([5, 6, 7])[:2]), abs=1e-6)


async def test_truncation(url: str, engine: FakeEngine) -> None:
    """vLLM's: the end of the prompt stays; -1 is the context."""
    long = list(range(2, 252))
    for limit in (3, -1):
        body = {"model": "e", "input": long, "truncate_prompt_tokens": limit}
        assert (await post(url + "/v1/embeddings", body))[0] == 200
    assert [g.prompt for g in engine.submitted] == [(249, 250, 251), tuple(long[-200:])]


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "m", "input": "x"}, 400, "model", 'write pooling = "mean" or "last"'),
        ({"model": "nobody", "input": "x"}, 404, "model", "does not exist"),
        ({"model": "e", "input": ""}, 400, "input", "empty"),
        ({"model": "e", "input": []}, 400, "input", "empty"),
        ({"model": "e", "input": ["x", ""]}, 400, "input", "empty"),
        ({"model": "e", "input": ["x", 1]}, 400, "input", "mixes"),
        ({"model": "e", "input": ["x"] * 2049}, 400, "input", "2049"),
        ({"model": "e", "input": [320]}, 400, "input", "320"),
        ({"model": "e", "input": [2] * 201}, 400, "input", "200 tokens"),
        ({"model": "e", "input": "x", "dimensions": 5}, 400, "dimensions", "4 dimensions"),
        ({"model": "e", "input": "x", "dimensions": 0}, 400, "dimensions", ""),
        ({"model": "e", "input": "x", "encoding_format": "int8"}, 400, "encoding_format", ""),
        ({"model": "e", "input": "x", "messages": [{}]}, 400, "messages", "not supported"),
        ({"model": "e"}, 400, "input", "input"),
    ],
)
async def test_refusals(
    url: str, engine: FakeEngine, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    """Before anything is started; the message says what to do."""
    found, answer = await post(url + "/v1/embeddings", fields)
    assert (found, answer["error"]["param"]) == (status, param)
    assert words in answer["error"]["message"]
    assert engine.submitted == []


async def test_many_inputs_come_a_few_at_a_time(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's list does not fill the queue; the answers keep their order."""
    monkeypatch.setattr(embedding, "_AT_ONCE", 4)
    engine.pause()
    asked = asyncio.create_task(
        post(url + "/v1/embeddings", {"model": "l", "input": [[i] for i in range(2, 12)]})
    )
    async with asyncio.timeout(10):
        while len(engine.submitted) < 4:
            await engine.arrived.wait()
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(engine.submitted) == 4
    engine.resume()
    _, answer = await asked
    for token, entry in zip(range(2, 12), answer["data"], strict=True):
        assert entry["embedding"] == pytest.approx(unit(hidden(token)), abs=1e-6)


async def test_a_failure_ends_the_others(url: str, engine: FakeEngine) -> None:
    """It becomes the status; nothing of the request goes on."""
    engine.failing = Finish(0, "failed", "no memory", "out_of_memory", 503, 1.0)
    status, answer = await post(url + "/v1/embeddings", {"model": "e", "input": ["a", "b", "c"]})
    assert (status, answer["error"]["code"]) == (503, "out_of_memory")
    await asyncio.wait_for(engine.idle.wait(), 10)


async def test_a_client_that_leaves(url: str, engine: FakeEngine) -> None:
    """Its inputs are cancelled."""
    engine.pause()
    body = {"model": "e", "input": ["a", "b", "c"]}
    asked = asyncio.create_task(post(url + "/v1/embeddings", body))
    async with asyncio.timeout(10):
        while len(engine.submitted) < 3:
            await engine.arrived.wait()
            await asyncio.sleep(0)
        asked.cancel()
        await engine.idle.wait()
    assert sorted(engine.cancelled) == [1, 2, 3]


async def test_metrics_count_a_vector_as_an_answer(url: str) -> None:
    """An end, a length, a latency; no output."""
    await post(url + "/v1/embeddings", {"model": "e", "input": [5, 6, 7]})
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
        page = await response.text()
    assert 'vllm:request_success_total{finished_reason="stop",model_name="e"} 1.0' in page
    assert 'vllm:request_prompt_tokens_sum{model_name="e"} 3.0' in page
    assert 'vllm:request_generation_tokens_sum{model_name="e"} 0.0' in page
    assert 'vllm:e2e_request_latency_seconds_count{model_name="e"} 1.0' in page


# --------------------------------------------------------------------------------- Ollama


async def test_ollama_embed(url: str, tokenizer: Tokenizer) -> None:
    """Vectors of length 1, and figures."""
    body = {"model": "e:latest", "input": ["hello", "world"], "dimensions": 3}
    status, answer = await post(url + "/api/embed", body)
    encoded = [tokenizer.encode(text).ids for text in body["input"]]
    assert (status, answer["model"]) == (200, "e:latest")
    for vector, tokens in zip(answer["embeddings"], encoded, strict=True):
        assert vector == pytest.approx(unit(mean(tokens)[:3]), abs=1e-6)
    assert answer["prompt_eval_count"] == sum(map(len, encoded))
    assert answer["total_duration"] > 0


async def test_ollama_truncates_unless_told_not_to(url: str, engine: FakeEngine) -> None:
    """The beginning stays, as there."""
    body = {"model": "e", "input": "hello " * 300}
    assert (await post(url + "/api/embed", body))[0] == 200
    assert len(engine.submitted[0].prompt) == 200
    assert engine.submitted[0].prompt[0] == 0
    status, answer = await post(url + "/api/embed", {**body, "truncate": False})
    assert (status, "context length" in answer["error"]) == (400, True)


async def test_ollama_embeddings(url: str, tokenizer: Tokenizer) -> None:
    """The older one does not scale."""
    status, answer = await post(url + "/api/embeddings", {"model": "e", "prompt": "hello"})
    assert status == 200
    assert answer["embedding"] == pytest.approx(mean(tokenizer.encode("hello").ids))


async def test_ollama_without_input(url: str, engine: FakeEngine) -> None:
    """Loads, keeps, unloads."""
    assert (await post(url + "/api/embed", {"model": "e", "keep_alive": 60}))[1]["embeddings"] == []
    assert (engine.loaded, engine.kept) == (["e"], {"e": 60.0})
    answer = (await post(url + "/api/embeddings", {"model": "e", "prompt": "", "keep_alive": 0}))[1]
    assert (answer, engine.evicted) == ({"embedding": []}, ["e"])


async def test_ollama_refusal(url: str) -> None:
    """In Ollama's shape."""
    status, answer = await post(url + "/api/embed", {"model": "m", "input": "x"})
    assert (status, "pooling" in answer["error"]) == (400, True)

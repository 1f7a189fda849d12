"""Greedy output through HTTP equals transformers' own `generate`, token for token, in float32.

Whatever was done to the requests in between: batched, chunked, their prefixes reused, preempted, evicted.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.e2e.conftest import NEW_TOKENS, prompts, short_prompts
from tests.e2e.daemon import GEMMA, SMOL, Daemon

pytestmark = pytest.mark.timeout(1800)  # transformers takes its time, on a busy machine above all

Reference = dict[str, list[list[int]]]
both = pytest.mark.parametrize("model", [SMOL, GEMMA])


def alone(daemon: Daemon, model: str) -> list[list[int]]:
    """One request after the other."""
    client = daemon.client()
    return [tokens_of(client.completions.create(**ask(model, prompt))) for prompt in prompts()]


def together(daemon: Daemon, model: str, at_once: int, texts: list[str] | None = None) -> list[list[int]]:
    """`at_once` requests in flight; for all prompts, or these."""

    async def run() -> list[list[int]]:
        limit = asyncio.Semaphore(at_once)
        async with daemon.async_client() as client:

            async def one(prompt: str) -> list[int]:
                async with limit:
                    return tokens_of(await client.completions.create(**ask(model, prompt)))

            return await asyncio.gather(*map(one, texts or prompts()))

    return asyncio.run(run())


def ask(model: str, prompt: str) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "extra_body": {"return_token_ids": True},
    }


def tokens_of(completion: object) -> list[int]:
    return completion.choices[0].token_ids  # type: ignore[attr-defined, no-any-return]


@both
def test_alone_and_again_with_prefix_reuse(daemon: Daemon, reference: Reference, model: str) -> None:
    """Chunked prefill of a long prompt; the second time every prompt's prefix is found again."""
    assert alone(daemon, model) == reference[model]
    usage = daemon.client().completions.create(**ask(model, prompts()[-1])).usage
    assert usage.prompt_tokens_details.cached_tokens > 1000
    assert alone(daemon, model) == reference[model]


@both
def test_sixteen_at_once(daemon: Daemon, reference: Reference, model: str) -> None:
    """Continuous batching: prefill chunks and decodes of many requests in one step."""
    assert together(daemon, model, 16) == reference[model]


def test_both_models_at_once(daemon: Daemon, reference: Reference) -> None:
    """Two services interleaved on the shared devices."""

    async def run() -> list[list[list[int]]]:
        return await asyncio.gather(*(asyncio.to_thread(together, daemon, m, 8) for m in (SMOL, GEMMA)))

    assert asyncio.run(run()) == [reference[SMOL], reference[GEMMA]]


@pytest.mark.parametrize(
    ("model", "host_kv"), [(SMOL, "0 B"), (SMOL, "64 MiB"), (GEMMA, "64 MiB")], ids=lambda value: value
)
def test_after_forced_preemption(
    small_daemon: Daemon, reference: Reference, model: str, host_kv: str
) -> None:
    """Too little memory for all: requests are preempted, their KV computed again or restored from host
    memory, and end the same."""
    texts = short_prompts()
    assert together(small_daemon, model, 20, texts) == reference[model][: len(texts)]
    status = small_daemon.service(model)
    assert status["preemptions"] > 0, "nothing was preempted: the test shows nothing"
    assert (status["saves"] > 0) == (host_kv != "0 B")


@both
def test_after_evict_and_load(daemon: Daemon, reference: Reference, model: str) -> None:
    """The weights come back where they were, or elsewhere, and are the same."""
    assert daemon.ctl("load", model).returncode == 0
    swaps = daemon.service(model)["swaps_in"]
    assert daemon.ctl("evict", model).returncode == 0
    assert daemon.service(model)["state"] == "absent"
    assert together(daemon, model, 16) == reference[model]
    assert daemon.service(model)["swaps_in"] == swaps + 1

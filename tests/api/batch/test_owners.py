"""Whose files and batches are whose, and what a key means for the lines of a batch."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
import pytest
from openai import APIStatusError, AsyncOpenAI

from seallmd.api.keys import Key, Keyring
from tests.api.batch.conftest import Serve, Served, jsonl, line
from tests.api.engine_double import FakeEngine

ALICE = Key(name="alice", key="sk-alice-0123456789", tier="priority", requests_per_minute=100)
BOB = Key(name="bob", key="sk-bob-0123456789ab", models=("other-*",))


def calling(served: Served, key: Key) -> AsyncOpenAI:
    """The client of somebody."""
    return served.client.with_options(api_key=key.key)


async def test_a_key_sees_its_own_alone(serve: Serve) -> None:
    """Protects what one key's people wrote from another's: each way to it is 404, as if it were not there."""
    async with serve(Keyring([ALICE, BOB])) as served:
        alice, bob = calling(served, ALICE), calling(served, BOB)
        file = await alice.files.create(file=("f", jsonl(line("a"))), purpose="batch")
        batch = await alice.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        tries: list[Callable[[], object]] = [
            lambda: bob.files.retrieve(file.id),
            lambda: bob.files.content(file.id),
            lambda: bob.files.delete(file.id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            ),
            lambda: bob.files.list(after=file.id),
            lambda: bob.batches.list(after=batch.id),
        ]
        for attempt in tries:
            with pytest.raises(APIStatusError) as caught:
                await attempt()  # type: ignore[misc]
            assert caught.value.status_code == 404
        assert not (await bob.files.list()).data
        assert not (await bob.batches.list()).data
        served.client = alice
        ended = await served.ended(batch)
        assert ended.output_file_id is not None
        with pytest.raises(APIStatusError):
            await bob.files.content(ended.output_file_id)


async def test_every_route_needs_a_key(serve: Serve) -> None:
    """Protects default-deny: none of these routes was opened."""
    async with serve(Keyring([ALICE])) as served, aiohttp.ClientSession() as session:
        for method, path in (
            *(("POST", "files"), ("GET", "files"), ("GET", "files/x"), ("GET", "files/x/content")),
            *(("DELETE", "files/x"), ("POST", "batches"), ("GET", "batches"), ("GET", "batches/x")),
            ("POST", "batches/x/cancel"),
        ):
            async with session.request(method, f"{served.url}/v1/{path}") as response:
                assert response.status == 401, (method, path)


async def test_lines_are_the_key_s_but_its_limits_are_not_theirs(serve: Serve, engine: FakeEngine) -> None:
    """Protects: prefixes stay the key's own, models it may not use are not there, and a batch takes nothing
    of what its key may ask in a minute."""
    async with serve(Keyring([ALICE, BOB])) as served:
        served.client = calling(served, ALICE)
        batch = await served.ended(await served.begin(*(line(f"{n}") for n in range(120))))
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 120
        assert {(g.tier, g.salt) for g in engine.submitted} == {("batch", "alice/")}
        response = await served.client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "x"}]
        )
        assert response.headers["x-ratelimit-remaining-requests"] == "99"
        served.client = calling(served, BOB)
        batch = await served.ended(await served.begin(line("a")))
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "model_not_found"


async def test_a_batch_whose_key_is_gone_fails(serve: Serve, engine: FakeEngine) -> None:
    """Protects: a key that was taken away stops what runs in its name, at the next start at the latest."""
    engine.pause()
    async with serve(Keyring([ALICE, BOB])) as served:
        served.client = calling(served, ALICE)
        batch = await served.begin(line("a"))
        await served.asked(1)
    engine.resume()
    async with serve(Keyring([BOB])) as served:
        async for happening in engine.feed.follow(1000):
            if happening.text.startswith(f"{batch.id} is failed"):
                break
        assert len(engine.submitted) == 1


async def test_many_batches_of_one_key(serve: Serve, engine: FakeEngine) -> None:
    """Protects the others: a key has a bounded number of batches that are not over."""
    engine.pause()
    async with serve(max_batches=2) as served:
        for _ in range(2):
            await served.begin(line("a"))
        with pytest.raises(APIStatusError, match="2 batches") as caught:
            await served.begin(line("a"))
        assert caught.value.status_code == 429

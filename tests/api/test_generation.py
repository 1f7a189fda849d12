"""Generation over HTTP with the real OpenAI client: texts, streams, choices, ends and usage."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from openai import APIError, AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from seallmd.core.events import Finish
from tests.api.engine_double import SPOKEN, FakeEngine

CHAT = [{"role": "user", "content": "hello"}]


async def events(url: str, path: str, body: dict[str, object]) -> list[str]:
    """The data of every event of a stream, as it is on the wire."""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        text = await response.text()
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]


async def test_completion(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """The plain case: text without the stop token, which usage counts; special tokens lead the prompt."""
    answer = await client.completions.create(model="m", prompt="hello", max_tokens=100)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (SPOKEN, "stop", 0)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "m"
    prompt = tokenizer.encode("hello").ids
    assert engine.submitted[0].prompt == tuple(prompt)
    assert prompt[0] == 0
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(engine.answer)
    assert answer.usage.total_tokens == len(prompt) + len(engine.answer)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_default_limits(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Completions stop after 16 tokens unless told otherwise, chats have the rest of the context."""
    answer = await client.completions.create(model="m", prompt=[5, 6, 7])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    await client.completions.create(model="m", prompt=[5] * 195)
    assert engine.submitted[1].max_tokens == 5
    await client.chat.completions.create(model="m", messages=CHAT)
    assert engine.submitted[2].max_tokens == 200 - len(engine.submitted[2].prompt)


async def test_chat(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """The template writes the BOS itself, so encoding must not add another one."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "<b>'\"&"},
    ]
    answer = await client.chat.completions.create(model="m", messages=messages)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        SPOKEN,
        "stop",
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    ids = list(engine.submitted[0].prompt)
    text = "<s><system>be brief\n<user>one\ntwo\n<assistant>\n<user><b>'\"&\n<assistant>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(0) == 1


async def test_chat_stream(client: AsyncOpenAI) -> None:
    """The role comes first, then whole characters, then the reason; usage has a chunk of its own."""
    stream = await client.chat.completions.create(
        model="m", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    *body, last = chunks
    assert body[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in body[1:])
    assert all(chunk.usage is None for chunk in body)
    texts = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(texts) == SPOKEN
    assert not any("\ufffd" in text for text in texts)
    assert len([text for text in texts if text]) > 3, "the text came in one piece: this is no stream"
    assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


async def test_completion_stream_on_the_wire(url: str) -> None:
    """Bytes of the protocol: [DONE] at the end, usage null in each chunk when asked for, else absent."""
    body = {"model": "m", "prompt": "hello", "max_tokens": 100, "stream": True}
    *chunks, done = await events(url, "/v1/completions", body)
    assert done == "[DONE]"
    assert not any("usage" in json.loads(chunk) for chunk in chunks)
    body["stream_options"] = {"include_usage": True}
    *chunks, done = await events(url, "/v1/completions", body)
    assert [json.loads(chunk)["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, done = await events(url, "/v1/completions", body)
    counts = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_times_choices(client: AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    """Choice i of prompt p has the index p*n+i, and seeds differ by i; a prompt counts once in usage."""
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await client.completions.create(
        model="m", prompt=[[9, 8], [7, 6, 5]], n=3, seed=40, max_tokens=100, stream=stream, **options
    )
    texts = dict.fromkeys(range(6), "")
    usage = None
    for part in [part async for part in answer] if stream else [answer]:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == dict.fromkeys(range(6), SPOKEN)
    assert [(g.prompt, g.sampling.seed) for g in engine.submitted] == [
        (prompt, 40 + i) for prompt in ((9, 8), (7, 6, 5)) for i in range(3)
    ]
    assert len({id(g.prompt) for g in engine.submitted}) == 2, "a long prompt takes memory once, not n times"
    assert usage is not None
    assert usage.prompt_tokens == 5
    assert usage.completion_tokens == 6 * len(engine.answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "extra", "text"),
    [
        (["日本"], {}, "Hello wörld, "),
        (["本語 a", "never"], {}, "Hello wörld, 日"),
        ("wörld", {"include_stop_str_in_output": True}, "Hello wörld"),
        (["zzz", "last.."], {}, SPOKEN),
        (["H"], {}, ""),
        ("wörld", {"min_tokens": 30}, None),
    ],
)
async def test_stop_strings(
    client: AsyncOpenAI,
    engine: FakeEngine,
    stream: bool,
    stop: object,
    extra: dict[str, object],
    text: str | None,
) -> None:
    """A stop string ends the text whatever tokens it lies in, is never shown, and frees the engine."""
    engine.answer = engine.answer[:-1]
    answer = await client.completions.create(
        model="m", prompt="hello", max_tokens=len(engine.answer), stop=stop, stream=stream, extra_body=extra
    )
    parts = [part async for part in answer] if stream else [answer]
    got = "".join(part.choices[0].text for part in parts)
    assert got == (SPOKEN if text is None else text)
    ended = text not in (None, SPOKEN)
    assert parts[-1].choices[0].finish_reason == ("stop" if ended else "length")
    assert bool(engine.cancelled) == ended
    assert not engine.live


async def test_stop_string_counts_no_later_tokens(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Usage ends at the token that completes the stop string, even if more had been generated by then."""
    answer = await client.completions.create(
        model="m", prompt="hello", max_tokens=100, stop="wörld", extra_body={"return_token_ids": True}
    )
    ids = answer.choices[0].token_ids
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids) < len(engine.answer)
    assert ids == engine.answer[: len(ids)]


async def test_choice_that_stops_early_is_cancelled_at_once(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """A choice that has its stop string must not be generated on while the others are."""
    engine.answers[8, 8] = [5]
    answer = await client.completions.create(
        model="m", prompt=[[9, 9], [8, 8]], max_tokens=150, stop="wörld", extra_body={"ignore_eos": True}
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert engine.cancelled == [1]


@pytest.mark.parametrize("stream", [False, True])
async def test_return_token_ids(client: AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    """vLLM's extra, which the parity tests stand on: all ids, stop token included, also over a stream."""
    extra = {"return_token_ids": True}
    answer = await client.completions.create(
        model="m", prompt=[3, 4], max_tokens=100, stream=stream, extra_body=extra
    )
    parts = [part async for part in answer] if stream else [answer]
    assert [token for part in parts for token in part.choices[0].token_ids] == engine.answer
    assert parts[0].choices[0].prompt_token_ids == [3, 4]
    answer = await client.chat.completions.create(model="m", messages=CHAT, stream=stream, extra_body=extra)
    parts = [part async for part in answer] if stream else [answer]
    choices = [choice for part in parts for choice in part.choices]
    ids = [token for choice in choices for token in getattr(choice, "token_ids", [])]
    assert ids == engine.answer
    assert parts[0].prompt_token_ids == list(engine.submitted[-1].prompt)


async def test_sampling_reaches_the_engine(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Every sampling field arrives under its own name; stop ids are the model's and the client's."""
    extra = {
        "top_k": -1,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "cache_salt": "tenant",
    }
    await client.completions.create(
        model="m",
        prompt="x",
        temperature=0,
        top_p=0.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"5": -100},
        seed=-1,
        extra_body=extra,
    )
    generation, sampling = engine.submitted[0], engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 0, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.5,
        -1,
        2,
    )
    assert sampling.logit_bias == ((5, -100.0),)
    assert sampling.seed == (1 << 63) - 1
    assert generation.stop_ids == (1, 7)
    assert (sampling.min_tokens, sampling.banned) == (2, (1, 7))
    assert generation.salt == "tenant"
    await client.completions.create(model="m", prompt="x", extra_body={"ignore_eos": True})
    assert engine.submitted[1].stop_ids == ()
    assert engine.submitted[1].sampling.banned == ()
    assert engine.submitted[1].sampling.seed != engine.submitted[0].sampling.seed


async def test_special_tokens_in_the_text(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Special tokens are left out unless asked for."""
    engine.answer = [0, *engine.answer]
    for skip, text in ((None, SPOKEN), (False, "<s>" + SPOKEN)):
        answer = await client.completions.create(
            model="m", prompt="x", max_tokens=100, extra_body={"skip_special_tokens": skip}
        )
        assert answer.choices[0].text == text


async def test_failure_before_the_first_token(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """A stream that never began has a real status, with the engine's code and its estimate."""
    engine.failing = Finish(0, "failed", "try later", "overloaded", 503, 1.2)
    with pytest.raises(APIError) as caught:
        await client.completions.create(model="m", prompt="x", stream=True)
    assert caught.value.status_code == 503
    assert caught.value.code == "overloaded"
    assert caught.value.response.headers["Retry-After"] == "2"
    assert caught.value.response.headers["x-should-retry"] == "true"


async def test_failure_in_mid_stream(client: AsyncOpenAI, engine: FakeEngine, url: str) -> None:
    """After the headers an error is an event: the client raises, what came before was delivered."""
    engine.failing, engine.fail_after = Finish(0, "failed", "the worker died", "worker_lost", 503), 5
    stream = await client.chat.completions.create(model="m", messages=CHAT, stream=True)
    texts: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            texts.extend([chunk.choices[0].delta.content or ""])

    with pytest.raises(APIError, match="the worker died"):
        await read()
    assert "".join(texts)
    assert SPOKEN.startswith("".join(texts))
    body = {"model": "m", "prompt": "x", "stream": True}
    *_, error, done = await events(url, "/v1/completions", body)
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "worker_lost"


async def test_failure_of_one_choice_ends_the_others(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """A response is whole or an error: no choice runs on for nobody."""
    start = engine._start

    def start_and_fail_the_second(generation):  # type: ignore[no-untyped-def]
        stream = start(generation)
        if stream.request == 2:
            engine._over(2)
            stream.end(Finish(2, "failed", "lost", "worker_lost", 500))
        return stream

    engine._start = start_and_fail_the_second
    engine.pause()
    with pytest.raises(APIError, match="lost"):
        await client.completions.create(model="m", prompt="x", n=3)
    assert sorted(engine.cancelled) == [1, 3]


async def test_cancelled_by_others_is_an_error(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """finish_reason knows stop and length alone: a request that was taken away must not look complete."""
    engine.failing = Finish(0, "cancelled")
    with pytest.raises(APIError) as caught:
        await client.completions.create(model="m", prompt="x")
    assert caught.value.status_code == 503


async def test_many_at_once(client: AsyncOpenAI) -> None:
    """Requests share the tokenizer's loading and the template process without mixing up."""
    names = [f"user {i}" for i in range(20)]
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": name}],
                extra_body={"return_token_ids": True},
            )
            for name in names
        )
    )
    assert len({tuple(answer.prompt_token_ids) for answer in answers}) == 20
    assert {answer.choices[0].message.content for answer in answers} == {SPOKEN}


async def test_synchronous_client(url: str) -> None:
    """The client that most people use, streaming, from a thread."""

    def talk() -> str:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="m", prompt="x", max_tokens=100, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(talk) == SPOKEN

"""Every field that is served: that its value reaches the engine, or shows in the answer."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.api.engine_double import FakeEngine

CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"repetition_penalty": 1.25}, {"repetition_penalty": 1.25}),
        ({"logit_bias": {"5": -100, "6": 1.5}}, {"logit_bias": ((5, -100.0), (6, 1.5))}),
        ({"logit_bias": {"5": 60, "05": 70}}, {"logit_bias": ((5, 70.0),)}),
        ({"allowed_token_ids": [5, 6]}, {"allowed": (5, 6)}),
        ({"min_tokens": 3}, {"min_tokens": 3, "banned": (1,)}),
        ({"min_tokens": 3, "stop_token_ids": [9]}, {"banned": (1, 9)}),
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "banned": (), "grammar": None}),
    ],
)
async def test_sampling(
    client: AsyncOpenAI, engine: FakeEngine, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Fields of sampling reach the engine, alike from both endpoints."""
    await client.completions.create(model="m", prompt="hello", extra_body=fields)
    await client.chat.completions.create(model="m", messages=CHAT, extra_body=fields)
    for sent in engine.submitted:
        assert {name: getattr(sent.sampling, name) for name in expected} == expected


async def test_ends(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """What ends an output: the model's own token unless ignored, and the client's."""
    await client.completions.create(model="m", prompt="x", extra_body={"stop_token_ids": [9, 1]})
    await client.completions.create(
        model="m", prompt="x", extra_body={"ignore_eos": True, "stop_token_ids": [9]}
    )
    assert [sent.stop_ids for sent in engine.submitted] == [(1, 9), (9,)]


async def test_bad_words(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """A word is a sequence of tokens, with and without the space before it."""
    await client.completions.create(model="m", prompt="x", extra_body={"bad_words": ["hello", " dog", "\n"]})
    words = {
        tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        for text in ("hello", " hello", "dog", " dog", "\n", " \n")
    }
    assert set(engine.submitted[0].sampling.bad_words) == words


async def test_cache_salt(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Prefixes are shared among equal salts alone (`core.events.Arrived.salt`)."""
    await client.completions.create(model="m", prompt="x", extra_body={"cache_salt": "mine"})
    await client.completions.create(model="m", prompt="x")
    assert [sent.salt for sent in engine.submitted] == ["mine", ""]


@pytest.mark.parametrize(("limit", "kept"), [(3, 3), (50, 9), (-1, 9), (None, 9)])
async def test_truncated_prompts(
    client: AsyncOpenAI, engine: FakeEngine, limit: int | None, kept: int
) -> None:
    """The end of the prompt stays."""
    await client.completions.create(
        model="m", prompt=list(range(10, 19)), extra_body={"truncate_prompt_tokens": limit}
    )
    assert engine.submitted[0].prompt == tuple(range(10, 19))[-kept:]


async def test_truncated_to_what_fits(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """-1 cuts a prompt that is longer than the context, so that the output fits too."""
    await client.completions.create(
        model="m", prompt=[5] * 400, max_tokens=20, extra_body={"truncate_prompt_tokens": -1}
    )
    assert len(engine.submitted[0].prompt) == 180


async def test_add_special_tokens(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """On for prompts and off for chats, unless told otherwise."""
    await client.completions.create(model="m", prompt="x", extra_body={"add_special_tokens": False})
    await client.chat.completions.create(model="m", messages=CHAT, extra_body={"add_special_tokens": True})
    assert engine.submitted[0].prompt[0] != 0
    assert engine.submitted[1].prompt[:2] == (0, 0)  # the template writes one itself


async def test_chat_without_a_new_turn(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """`add_generation_prompt` begins a turn, `continue_final_message` leaves the last one open."""
    messages = [*CHAT, {"role": "assistant", "content": "well, the"}]
    for fields in ({"add_generation_prompt": False}, {"continue_final_message": True}):
        await client.chat.completions.create(model="m", messages=messages, extra_body=fields)
    texts = [tokenizer.decode(list(s.prompt), skip_special_tokens=False) for s in engine.submitted]
    assert texts[0] == "<s><user>hello\n<assistant>well, the\n"
    assert texts[1] == "<s><user>hello\n<assistant>well, the"


async def test_chat_template_kwargs(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Names for the template alone."""
    extra = {"chat_template_kwargs": {"hint": "psst"}}
    await client.chat.completions.create(model="m", messages=CHAT, extra_body=extra)
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    assert text.startswith("<s>psst<user>")


@pytest.mark.parametrize("stream", [False, True])
async def test_names_of_the_answer(client: AsyncOpenAI, stream: bool) -> None:
    """The client's own id, and the tier that serves, which is one for all."""
    for prefix, create in (
        ("cmpl", lambda **more: client.completions.create(prompt="x", **more)),
        ("chatcmpl", lambda **more: client.chat.completions.create(messages=CHAT, **more)),
    ):
        answer = await create(
            model="m",
            max_tokens=3,
            stream=stream,
            extra_body={"request_id": "me-1", "service_tier": "auto", "user": "u"},
        )
        parts = [part async for part in answer] if stream else [answer]
        assert {part.id for part in parts} == {f"{prefix}-me-1"}
        assert {part.service_tier for part in parts} == {"default"}


async def test_token_ids(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """`return_token_ids`: of the output and of the prompt."""
    answer = await client.completions.create(
        model="m", prompt=[5, 6], max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].token_ids == engine.answer[:3]
    assert answer.choices[0].prompt_token_ids == [5, 6]

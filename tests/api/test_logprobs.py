"""Log-probabilities over HTTP: OpenAI's two shapes, echoes, vLLM's prompt_logprobs, streamed and not."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from seallmd.api.logprobs import LogprobWriter, PromptLogprobs, TokenScore
from seallmd.api.vocabulary import Vocabulary
from tests.api.engine_double import SPOKEN, FakeEngine, logprob_of

CHAT = [{"role": "user", "content": "hello"}]


async def completion(client: AsyncOpenAI, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a completion by index; those of a stream put together again."""
    answer = await client.completions.create(model="m", stream=stream, **fields)
    parts = [part async for part in answer] if stream else [answer]
    choices: dict[int, dict[str, Any]] = {}
    for part in (choice.model_dump() for whole in parts for choice in whole.choices):
        known = choices.setdefault(part["index"], {"text": "", "logprobs": {}, "prompt_logprobs": None})
        known["text"] += part["text"]
        known["finish_reason"] = part["finish_reason"]
        known["prompt_logprobs"] = known["prompt_logprobs"] or part.get("prompt_logprobs")
        for name, values in (part["logprobs"] or {}).items():
            known["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion(
    client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    """Parallel arrays with an entry for each token, the stop token included; offsets point into the text."""
    (choice,) = await completion(client, stream, prompt="hello", max_tokens=100, logprobs=2)
    told = choice["logprobs"]
    answer = engine.answer
    assert choice["text"] == SPOKEN
    assert told["token_logprobs"] == [logprob_of(token) for token in answer]
    first = Vocabulary(tokenizer).text(answer[0])
    names = [tokenizer.decode([i]) for i in (40, 41)]
    assert told["tokens"][0] == first
    third = told["tokens"][2]
    assert told["top_logprobs"][2] == {names[0]: -0.25, names[1]: -0.5, third: logprob_of(answer[2])}
    assert len(told["top_logprobs"]) == len(told["text_offset"]) == len(answer)
    pieces = zip(told["tokens"], told["text_offset"], strict=True)
    assert all(SPOKEN[at:].startswith(text) for text, at in pieces if "\ufffd" not in text and text != "</s>")
    assert told["text_offset"][-1] == len(SPOKEN)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello wörld", [[5, 6, 7], [8, 9]]])
async def test_echo(client: AsyncOpenAI, engine: FakeEngine, stream: bool, prompt: Any) -> None:
    """Each choice of each prompt begins with its prompt; only the first choice asks the engine for scores."""
    choices = await completion(client, stream, prompt=prompt, n=2, max_tokens=3, logprobs=1, echo=True)
    for index, choice in enumerate(choices):
        sent = engine.submitted[index]
        assert sent.sampling.prompt_logprobs == (1 if index % 2 == 0 else -1)
        told = choice["logprobs"]
        assert told["token_logprobs"] == [
            None,
            *(logprob_of(token) for token in (*sent.prompt[1:], *engine.answer[:3])),
        ]
        assert told["top_logprobs"][0] is None
        assert told["text_offset"] == sorted(told["text_offset"])
        if isinstance(prompt, str):
            assert choice["text"].startswith(prompt + SPOKEN[:2])
            assert told["text_offset"][len(sent.prompt)] == len(prompt)
            assert told["tokens"][0] == "<s>"


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_what_lm_eval_reads(client: AsyncOpenAI, max_tokens: int) -> None:
    """lm-eval's local-completions: log-likelihood of a continuation from echo, logprobs and no output."""
    answer = await client.completions.create(
        model="m", prompt=[[5, 6, 7, 8]], max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=3
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[2:4] == [logprob_of(7), logprob_of(8)]
    assert len(told.token_logprobs) == 4 + max_tokens
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat(client: AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    """A list over tokens, each with its bytes, from which the text can be put together."""
    answer = await client.chat.completions.create(
        model="m", messages=CHAT, logprobs=True, top_logprobs=2, stream=stream
    )
    parts = [part async for part in answer] if stream else [answer]
    told = [
        token
        for part in parts
        for choice in part.choices
        for token in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert [token.logprob for token in told] == [logprob_of(token) for token in engine.answer]
    assert [[top.logprob for top in token.top_logprobs] for token in told] == [[-0.25, -0.5]] * len(told)
    assert b"".join(bytes(token.bytes) for token in told) == SPOKEN.encode() + b"</s>"


async def test_nobody_asked(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Without the fields the engine is not asked, and the places are null."""
    answer = await client.completions.create(model="m", prompt="hello", max_tokens=3)
    chat = await client.chat.completions.create(model="m", messages=CHAT, max_tokens=3)
    assert answer.choices[0].logprobs is None
    assert chat.choices[0].logprobs is None
    for sent in engine.submitted:
        assert (sent.sampling.logprobs, sent.sampling.prompt_logprobs) == (-1, -1)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs(client: AsyncOpenAI, stream: bool) -> None:
    """vLLM's: by id, with rank and text, null for the first token; of completions in the choice."""
    (choice,) = await completion(
        client, stream, prompt=[5, 6, 7], max_tokens=2, extra_body={"prompt_logprobs": 1}
    )
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second["6"] == {"logprob": logprob_of(6), "rank": 7, "decoded_token": second["6"]["decoded_token"]}
    assert third["40"]["logprob"] == -0.25
    assert third["40"]["rank"] == 1
    assert choice["logprobs"] == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_of_a_chat(client: AsyncOpenAI, engine: FakeEngine, stream: bool) -> None:
    """Beside the choices, once."""
    answer = await client.chat.completions.create(
        model="m", messages=CHAT, n=2, max_tokens=2, stream=stream, extra_body={"prompt_logprobs": 0}
    )
    parts = [part async for part in answer] if stream else [answer]
    told = [part.prompt_logprobs for part in parts if getattr(part, "prompt_logprobs", None)]
    assert len(told) == 1
    assert [len(entry or {}) for entry in told[0]] == [0, *[1] * (len(engine.submitted[0].prompt) - 1)]


async def test_tokens_as_ids(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Tells apart tokens of one text."""
    (choice,) = await completion(
        client,
        False,
        prompt="hello",
        max_tokens=2,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True},
    )
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in engine.answer[:2]]
    assert "token_id:40" in choice["logprobs"]["top_logprobs"][0]


async def test_too_many(client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer may grow to has a limit, told before anything runs."""
    monkeypatch.setattr("seallmd.api.limits.MAX_PROMPT_SCORES", 20)
    monkeypatch.setattr("seallmd.api.limits.MAX_OUTPUT_SCORES", 20)
    with pytest.raises(Exception, match="of the prompt"):
        await client.completions.create(model="m", prompt=[5] * 7, echo=True, logprobs=2)
    with pytest.raises(Exception, match="of the prompt"):  # each choice of a completion tells them
        await client.completions.create(model="m", prompt=[5] * 4, n=2, extra_body={"prompt_logprobs": 2})
    messages = [{"role": "user", "content": ""}]
    await client.chat.completions.create(model="m", messages=messages, n=2, extra_body={"prompt_logprobs": 0})
    with pytest.raises(Exception, match="may come"):
        await client.completions.create(model="m", prompt=[5] * 7, logprobs=2, max_tokens=7)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_are_worded_beside_the_loop(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Seconds, for a million log-probabilities: streams of others must not wait for them."""
    seen, word = list[bool](), LogprobWriter.prompt

    def prompt(writer: LogprobWriter, scores: Iterable[TokenScore]) -> PromptLogprobs:
        seen.append(threading.current_thread() is threading.main_thread())
        return word(writer, scores)

    monkeypatch.setattr(LogprobWriter, "prompt", prompt)
    answer: Any = await client.completions.create(
        model="m", prompt="hello", n=2, stream=stream, extra_body={"prompt_logprobs": 2}
    )
    if stream:
        assert [chunk async for chunk in answer]
    assert seen == [False, False]

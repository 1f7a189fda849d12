"""The generation API with real models: log-probabilities, structured outputs and tools."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.daemon import MODELS, SMOL, Daemon

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. " * 12
ASK = [{"role": "user", "content": "What is the weather in Rome? Use a tool."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def reference() -> tuple[list[int], torch.Tensor]:
    """The text's ids, and transformers' log-probabilities [tokens, vocabulary]."""
    ids = AutoTokenizer.from_pretrained(MODELS / SMOL)(TEXT).input_ids
    model = AutoModelForCausalLM.from_pretrained(MODELS / SMOL, dtype=torch.float32).eval()
    with torch.inference_mode():
        return ids, torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_likelihoods(
    daemon: Daemon, reference: tuple[list[int], torch.Tensor], stream: bool, max_tokens: int
) -> None:
    """As lm-eval asks: echo, logprobs and no output; within 1e-3 of transformers', over several chunks."""
    ids, expected = reference
    ask: dict[str, Any] = {"prompt": [ids], "max_tokens": max_tokens, "logprobs": 2, "echo": True}
    answer = daemon.client().completions.create(model=SMOL, temperature=0, stream=stream, **ask)
    told: dict[str, list[Any]] = {"token_logprobs": [], "top_logprobs": []}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            for name in told if choice.logprobs else ():
                told[name] += getattr(choice.logprobs, name)
    assert len(told["token_logprobs"]) == len(ids) + max_tokens
    wanted = [float(expected[at - 1, ids[at]]) for at in range(1, len(ids))]
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(wanted, abs=1e-3)
    best = [float(expected[at - 1].max()) for at in range(1, len(ids))]
    assert [max(top.values()) for top in told["top_logprobs"][1 : len(ids)]] == pytest.approx(best, abs=1e-3)


def test_output_logprobs_are_those_of_the_echo(daemon: Daemon) -> None:
    """What was told of tokens as they were drawn is told again when they are a prompt."""
    client = daemon.client()
    prompt = [20, 21, 22, 23]
    made = client.completions.create(
        model=SMOL,
        prompt=prompt,
        max_tokens=8,
        seed=3,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).choices[0]
    again = client.completions.create(
        model=SMOL, prompt=[*prompt, *made.token_ids], max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert again.logprobs.token_logprobs[4:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(daemon: Daemon, stream: bool) -> None:
    """A small model that would not write it by itself: every one of several hot choices is valid."""
    answer = daemon.client().chat.completions.create(
        model=SMOL,
        messages=[{"role": "user", "content": "Say something."}],
        n=3,
        max_tokens=120,
        temperature=1.5,
        seed=1,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}},
    )
    texts, reasons = dict.fromkeys(range(3), ""), dict.fromkeys(range(3), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            message = choice.delta if stream else choice.message
            texts[choice.index] += message.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    for index, text in texts.items():
        if reasons[index] == "length":  # a number may go on for ever
            continue
        assert set(json.loads(text)) == {"city", "degrees"}
    assert "stop" in reasons.values()


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{2,5} \d{3}"}, r"[A-Z][a-z]{2,5} \d{3}"),
        ({"choice": ["red wine", "blue cheese"]}, "red wine|blue cheese"),
        ({"grammar": 'root ::= "a" ("b" | "cc"){3}'}, "a(b|cc){3}"),
    ],
)
def test_structured_outputs(daemon: Daemon, form: dict[str, Any], pattern: str) -> None:
    """Regular expressions, choices and grammars; min_tokens gives way to the grammar."""
    answer = daemon.client().completions.create(
        model=SMOL,
        prompt="The answer:",
        max_tokens=40,
        temperature=1,
        extra_body={"structured_outputs": form, "min_tokens": 30},
    )
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


def test_hostile_grammars(daemon: Daemon) -> None:
    """Refused in good time, and the daemon serves on."""
    client = daemon.client()
    for form in ({"regex": "(" * 5000}, {"grammar": "root ::= root root | root"}, {"json": {"$ref": "#"}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(
                model=SMOL, prompt="x", max_tokens=4, extra_body={"structured_outputs": form}
            )
    assert client.completions.create(model=SMOL, prompt="x", max_tokens=2).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tools(daemon: Daemon, stream: bool, choice: Any) -> None:
    """A forced call has a name that is offered and arguments that fit its schema."""
    answer = daemon.client().chat.completions.create(
        model=SMOL,
        messages=ASK,
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=150,
        temperature=0,
        stream=stream,
    )
    name, arguments, reason = "", "", None
    for part in answer if stream else [answer]:
        entry = part.choices[0]
        for call in (entry.delta if stream else entry.message).tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reason = entry.finish_reason or reason
    assert name == "weather"
    assert reason == "tool_calls"
    assert set(json.loads(arguments)) == {"city", "degrees"}


def test_min_tokens_bad_words_and_allowed_ids(daemon: Daemon) -> None:
    """The sampler's bans, end to end."""
    client = daemon.client()
    ask: dict[str, Any] = {"model": SMOL, "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(**ask).choices[0].text
    found = re.search("[a-z]+", plain)
    assert found is not None
    word = found.group()
    without = client.completions.create(**ask, extra_body={"bad_words": [word]}).choices[0].text
    assert word not in without
    few = client.completions.create(
        **ask, extra_body={"allowed_token_ids": [40, 41], "return_token_ids": True}
    )
    assert set(few.choices[0].token_ids) <= {40, 41}

"""/v1/responses with the real OpenAI client: texts, calls, forms, the order of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from tests.api.engine_double import SPOKEN, FakeEngine, view

NOW = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
CALL = 'So:<tool_call>{"name": "now", "arguments": {"zone": "CET"}}</tool_call>'


@pytest.fixture(autouse=True)
def long_context(engine: FakeEngine, model: Path) -> None:
    """Explaining tools takes some words."""
    engine.views["m"] = view("m", model, context=4000)


async def test_whole(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Instructions lead, the text is one message, usage has the new names."""
    answer = await client.responses.create(model="m", input="hello", instructions="be brief", temperature=0)
    assert answer.output_text == SPOKEN
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(engine.answer)
    assert answer.usage.input_tokens_details.cached_tokens == 2
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    assert text == "<s><system>be brief\n<user>hello\n<assistant>"
    assert engine.submitted[0].sampling.temperature == 0


async def test_a_whole_conversation(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Items of every kind become messages."""
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": '{"z":1}'},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is noon."}]},
    ]
    answer = await client.responses.create(model="m", input=items, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    assert '<assistant><tool_call>\n{"name":"now","arguments":{"z":1}}\n</tool_call>' in text
    assert "<tool_response>\nnoon" in text
    assert text.endswith("<assistant>It is noon.\n<assistant>")


async def test_calls_are_of_the_turn_that_makes_them(
    client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """Text and calls of one answer come back as items of their own; templates want turns that alternate."""
    calls = [{"type": "function_call", "call_id": i, "name": "now", "arguments": "{}"} for i in ("c", "d")]
    results = [{"type": "function_call_output", "call_id": i, "output": f"noon {i}"} for i in ("c", "d")]
    said = {"role": "assistant", "content": "I look."}
    items: list[Any] = [{"role": "user", "content": "hello"}, said, *calls, *results]
    await client.responses.create(model="m", input=items)
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    call = '<tool_call>\n{"name":"now","arguments":{}}\n</tool_call>'
    told = "<user>hello\n" + f"<assistant>I look.\n{call}\n{call}\n"
    told += "<user><tool_response>\nnoon c\n</tool_response>\n<tool_response>\nnoon d\n</tool_response>\n"
    assert text == f"<s>{told}<assistant>"


async def test_stream(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Every item is added, grows and is done; numbers run on; the last event has it all."""
    engine.answer = [*tokenizer.encode(CALL, add_special_tokens=False).ids, 1]
    stream = await client.responses.create(model="m", input="hello", tools=[NOW], stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "function_call_arguments.delta"),
        *("function_call_arguments.done", "completed"),
    ]
    final = events[-1].response
    message, call = final.output
    assert message.content[0].text == "So:"
    assert (call.name, json.loads(call.arguments)) == ("now", {"zone": "CET"})
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 1


@pytest.mark.parametrize("answer", [SPOKEN, CALL])
async def test_what_is_cut_off_is_not_complete(
    client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer, answer: str
) -> None:
    """Least of all a call: whoever makes it would have half its arguments."""
    tokens = tokenizer.encode(answer, add_special_tokens=False).ids
    engine.answer, limit = [*tokens, 1], len(tokens) - 12
    asked: Any = {"model": "m", "input": "hello", "tools": [NOW], "max_output_tokens": limit}
    whole = await client.responses.create(**asked)
    assert whole.output[-1].status == whole.status == "incomplete"  # type: ignore[union-attr]
    events = [event async for event in await client.responses.create(**asked, stream=True)]
    assert events[-1].response.output[-1].status == "incomplete"
    assert [e.item.status for e in events if e.type == "response.output_item.done"][-1] == "incomplete"


async def test_forms(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """`text.format` and forced tools become grammars."""
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    await client.responses.create(model="m", input="hello", text=wanted)
    await client.responses.create(
        model="m", input="hello", tools=[NOW], tool_choice={"type": "function", "name": "now"}
    )
    for sent, part in zip(engine.submitted, ('"a"', "now"), strict=True):
        assert sent.sampling.grammar is not None
        assert part in sent.sampling.grammar.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "response_format"),
    ],
)
async def test_refusals(
    client: AsyncOpenAI, engine: FakeEngine, fields: dict[str, Any], param: str | None
) -> None:
    """400 with the field at fault."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", **{"input": "x", **fields})
    assert caught.value.param == param or param is None
    assert engine.submitted == []

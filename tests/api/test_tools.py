"""Tool calls: reading each family's way of writing them, forcing them, and OpenAI's shapes."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer

from seallmd.api.tool_formats import FORMATS, calls_grammar, choose_format
from seallmd.api.tool_reader import Argued, Called, Event, Said, ToolReader
from tests.api.engine_double import FakeEngine, view, write_model

CHAT = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Z\\"}ü"}}\n</tool_call>'

Calls = list[tuple[str, str]]


def read(family: str, text: str, cuts: list[int], **options: bool) -> tuple[str, Calls]:
    """What is said, and (name, arguments) of each call, of a text that comes in pieces."""
    reader, events = ToolReader(FORMATS[family], **options), list[Event]()
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += reader.push(text[begin:end])
    events += reader.flush()
    calls = [event for event in events if isinstance(event, Called)]
    assert [call.index for call in calls] == list(range(len(calls)))
    arguments = [
        "".join(e.text for e in events if isinstance(e, Argued) and e.index == call.index) for call in calls
    ]
    said = "".join(event.text for event in events if isinstance(event, Said))
    return said, [(call.name, argued) for call, argued in zip(calls, arguments, strict=True)]


READ: list[tuple[str, str, str, Calls]] = [
    ("hermes", "just text, 1 < 2", "just text, 1 < 2", []),
    ("hermes", HERMES, "", [("weather", '{"city": "Z\\"}ü"}')]),
    (
        "hermes",
        f"Let me see.\n{HERMES}\n{HERMES}",
        "Let me see.",
        [("weather", '{"city": "Z\\"}ü"}')] * 2,
    ),
    ("hermes", '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', "", [("f", '{"a": [1]}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> ok', " ok", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", "<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", "a <tool_", "a <tool_", []),
    # Cut off before the name is known: whatever it was to become, it was written.
    ("hermes", 'a <tool_call>{"name": "f", "argu', 'a <tool_call>{"name": "f", "argu', []),
    ("llama3_json", '{"answer": "forty-tw', '{"answer": "forty-tw', []),
    # What small models write.
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ok', " ok", [("f", '{"a": 1}')]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}, "id": "x}y", "more": {"a": 1}}</tool_call> ok',
        " ok",
        [("f", "{}")],
    ),
    # What no JSON can hold.
    *(
        ("hermes", text, text, [])
        for text in (
            '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}</tool_call>',
            '<tool_call>{"arguments": {"a": NaN}, "name": "f"}</tool_call>',
            '<tool_call>{"arguments": {}, "name": "\\udfff"}</tool_call>',
        )
    ),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": "x;{"}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": "x;{"}'), ("g", "{}")],
    ),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("llama3_json", 'no {"name": "f", "parameters": {}}', 'no {"name": "f", "parameters": {}}', []),
    ("llama3_json", '{"city": "Rome"}', '{"city": "Rome"}', []),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1, 2]}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": [1, 2]}'), ("g", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}',
        "",
        [("f", '{"a": 1}'), ("g", '{"b": 2}')],
    ),
    ("mistral", "plain [TOOL", "plain [TOOL", []),
]


@pytest.mark.parametrize(("family", "text", "said", "calls"), READ)
def test_reading(family: str, text: str, said: str, calls: Calls) -> None:
    """The same is read however the text is cut into pieces."""
    chance = random.Random(text)
    everywhere = list(range(1, len(text)))
    for cuts in ([], everywhere, *(sorted(chance.sample(everywhere, 3)) for _ in range(20))):
        found, made = read(family, text, cuts)
        assert (found.strip(), made) == (said.strip(), calls), cuts


def test_one_call_only() -> None:
    """Without parallel calls the first one counts."""
    said, calls = read("hermes", HERMES + "\n" + HERMES + " and more", [], several=False)
    assert (said, len(calls)) == ("", 1)


def test_arguments_are_streamed() -> None:
    """A client sees arguments as they are written, not at their end."""
    reader = ToolReader(FORMATS["hermes"])
    reader.push('<tool_call>{"name": "f", "arguments": {"a')
    assert reader.push("bc") == [Argued(0, "bc")]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ("<tool_call>", "hermes"),
        ("nothing", "hermes"),
    ],
)
def test_choosing(template: str, family: str) -> None:
    """By the template, unless the configuration says otherwise."""
    assert choose_format("auto", template) == FORMATS[family]
    assert choose_format("none", template) is None
    assert choose_format("llama3_json", template) == FORMATS["llama3_json"]


@pytest.mark.parametrize("family", list(FORMATS))
@pytest.mark.parametrize("several", [False, True])
def test_forced_calls_are_read_back(model: Path, family: str, several: bool) -> None:
    """What the grammar lets through is what the reader reads: random walks through it."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"enum": ["a", "b"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    functions = [("f", schema), ("g", {**schema, "required": ["n"]})]
    grammar = calls_grammar(FORMATS[family], functions, several=several, added=lambda _: None)
    tokenizer = LLTokenizer((model / "tokenizer.json").read_text(), n_vocab=320, eos_token=1)
    chance = random.Random(family)
    for _ in range(5):
        matcher, text = LLMatcher(tokenizer, grammar), b""
        assert not matcher.is_error(), matcher.get_error()
        while not (matcher.is_accepting() and (matcher.is_stopped() or chance.random() < 0.5)):
            mask = matcher.compute_bitmask()
            token = chance.choice([i for i in range(2, 320) if mask[i // 8] >> i % 8 & 1])
            matcher.consume_token(token)
            text += tokenizer.decode_bytes([token])
        said, calls = read(family, text.decode(), [])
        assert said == ""
        assert calls
        assert several or len(calls) == 1
        for name, arguments in calls:
            assert name in ("f", "g")
            assert 0 <= json.loads(arguments)["n"] <= 99


# ------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture(autouse=True)
def long_context(request: pytest.FixtureRequest, model: Path) -> None:
    """Explaining tools takes some words."""
    if "engine" in request.fixturenames:
        engine: FakeEngine = request.getfixturevalue("engine")
        engine.views["m"] = view("m", model, context=4000)


def speak(engine: FakeEngine, tokenizer: Tokenizer, text: str) -> None:
    engine.answer = [*tokenizer.encode(text, add_special_tokens=False).ids, 1]


async def ask(client: AsyncOpenAI, stream: bool, **fields: Any) -> tuple[str | None, list[Any], str | None]:
    """(content, calls as {name, arguments, id}, finish reason)"""
    answer = await client.chat.completions.create(model="m", messages=CHAT, stream=stream, **fields)
    if not stream:
        choice = answer.choices[0]
        calls = [
            {"id": c.id, "type": c.type, **c.function.model_dump(include={"name", "arguments"})}
            for c in choice.message.tool_calls or ()
        ]
        return choice.message.content, calls, choice.finish_reason
    return await join(answer)


async def join(answer: AsyncIterator[Any]) -> tuple[str | None, list[Any], str | None]:
    content, calls, reason = "", list[dict[str, Any]](), None
    async for chunk in answer:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.index == len(calls):
                calls.append({"id": call.id, "type": call.type, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
    return content or None, calls, reason


@pytest.mark.parametrize("stream", [False, True])
async def test_calls(client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    """Calls in OpenAI's shape, with ids of their own, whole and streamed alike; text stays beside them."""
    speak(engine, tokenizer, f"Well.{HERMES}{HERMES}")
    content, calls, reason = await ask(client, stream, tools=[WEATHER, NOW])
    assert content == "Well."
    assert reason == "tool_calls"
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": 'Z"}ü'}] * 2
    assert {(call["name"], call["type"]) for call in calls} == {("weather", "function")}
    assert len({call["id"] for call in calls}) == 2
    assert engine.submitted[0].sampling.grammar is None


@pytest.mark.parametrize("stream", [False, True])
async def test_without_tools_it_is_text(
    client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    """Nobody parses what was not asked for, `tool_choice` none included."""
    speak(engine, tokenizer, HERMES)
    assert await ask(client, stream) == (HERMES, [], "stop")
    assert await ask(client, stream, tools=[WEATHER], tool_choice="none") == (HERMES, [], "stop")


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"tool_choice": "required"}, HERMES, "text"),
        ({"tool_choice": "required"}, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "{}"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            HERMES,
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, HERMES, HERMES + "\n" + HERMES),
        ({"tool_choice": "required"}, HERMES + "\n" + HERMES, HERMES * 2),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "text"),
        ({"response_format": {"type": "json_object"}}, HERMES, "[]"),
    ],
)
async def test_forced(
    client: AsyncOpenAI, engine: FakeEngine, model: Path, fields: dict[str, Any], good: str, bad: str
) -> None:
    """A forced call is a grammar: the model cannot write anything else."""
    await ask(client, False, tools=[WEATHER, NOW], **fields)
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    tokenizer = LLTokenizer((model / "tokenizer.json").read_text(), n_vocab=320, eos_token=1)
    for text, fits in ((good, True), (bad, False)):
        matcher = LLMatcher(tokenizer, grammar.text)
        assert (matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()) is fits


async def test_forced_calls_are_written_in_the_models_own_tokens(
    client: AsyncOpenAI, engine: FakeEngine, tmp_path: Path
) -> None:
    """Qwen's tags are tokens, though not special ones: spelt in others they are nothing it has learnt."""
    tokenizer = write_model(tmp_path)
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine.views["m"] = view("m", tmp_path, vocab=400, context=4000)
    await ask(client, False, tools=[WEATHER, NOW], tool_choice="required")
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    reader = LLTokenizer((tmp_path / "tokenizer.json").read_text(), n_vocab=400, eos_token=1)
    for text in (HERMES, HERMES + "\n" + HERMES):
        matcher = LLMatcher(reader, grammar.text)
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.token_to_id("</tool_call>") in tokens
        assert matcher.consume_tokens(tokens)
        assert matcher.is_accepting()


async def test_a_template_without_tools(
    client: AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """Tools, earlier calls and their results are told in words, in the way of Hermes."""
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"z": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    await client.chat.completions.create(model="m", messages=messages, tools=[NOW], max_tokens=1)
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    assert text.startswith("<s><system>Be brief.\n\nYou are an expert")
    assert '"name":"now"' in text
    assert '<assistant><tool_call>\n{"name":"now","arguments":{"z":1}}\n</tool_call>' in text
    assert "<user><tool_response>\nnoon\n</tool_response>" in text


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


async def test_results_of_several_calls_are_one_turn(
    client: AsyncOpenAI, engine: FakeEngine, tmp_path: Path
) -> None:
    """Gemma's and Mistral's templates, for two, refuse two turns of one side."""
    write_model(tmp_path, ALTERNATING)
    engine.views["m"] = view("m", tmp_path, context=4000)
    calls = [
        {"id": i, "type": "function", "function": {"name": "now", "arguments": "{}"}} for i in ("c", "d")
    ]
    results = [{"role": "tool", "tool_call_id": i, "content": "noon"} for i in ("c", "d")]
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    answer = await client.chat.completions.create(model="m", messages=messages)
    assert answer.choices[0].message.content

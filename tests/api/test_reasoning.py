"""Reasoning: thoughts are told apart from answers, in every shape that clients read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer

from seallmd.api.reasoning import TAGS, ReasoningReader, knows_reasoning, leaves_open
from tests.api.engine_double import SPOKEN, FakeEngine, view, write_model

CHAT = [{"role": "user", "content": "hello"}]
# As Qwen3's: thoughts of earlier turns are told, and the switch closes those of the next one.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or () %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek-R1's and QwQ's: the opening tag is the template's.
OPENING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}{# </think> #}"
)
CALL = '<tool_call>{"name": "now", "arguments": {"zone": "CET"}}</tool_call>'
NOW = {"type": "function", "function": {"name": "now"}}
THOUGHT = "They greet.\n\nI greet, too."
OUTPUT = f"<think>\n{THOUGHT}\n</think>\n\n{SPOKEN}"


def read(text: str, cuts: list[int], *, is_open: bool = False) -> tuple[str, str]:
    """Thoughts and answer of a text that comes in pieces."""
    reader, told = ReasoningReader(is_open=is_open), list[tuple[str, str]]()
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        told.append(reader.push(text[begin:end]))
    told.append(reader.flush())
    return "".join(thought for thought, _ in told), "".join(said for _, said in told)


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "said"),
    [
        (OUTPUT, False, THOUGHT, SPOKEN),
        (OUTPUT, True, THOUGHT, SPOKEN),
        (OUTPUT.removeprefix("<think>\n"), True, THOUGHT, SPOKEN),
        (OUTPUT.removeprefix("<think>\n"), False, "", OUTPUT.removeprefix("<think>\n")),
        ("<think>\n\n</think>\n\nyes", False, "", "yes"),
        ("</think>yes", True, "", "yes"),
        ("no thoughts <think>a</think>", False, "", "no thoughts <think>a</think>"),
        ("<think>a < b </th </think>c</think> \n", False, "a < b </th", "c</think> \n"),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<think>cut \n", False, "cut", ""),
        ("<thi", False, "", "<thi"),
        ("<thi", True, "<thi", ""),
        (" \n", False, "", " \n"),
        ("", True, "", ""),
        ("\n yes", False, "", "\n yes"),
    ],
)
def test_reading(text: str, is_open: bool, thought: str, said: str) -> None:
    """The same is read however the text is cut into pieces, and nothing but tags and white space is lost."""
    chance, everywhere = random.Random(text), list(range(1, len(text)))
    samples = [sorted(chance.sample(everywhere, 3)) for _ in range(20)] if len(text) > 3 else []
    for cuts in ([], everywhere, *samples):
        assert read(text, cuts, is_open=is_open) == (thought, said), cuts


def test_thoughts_are_streamed() -> None:
    """A client sees them as they come, but for what may be a tag."""
    reader = ReasoningReader(is_open=True)
    assert reader.push("so <") == ("so", "")
    assert reader.push("b> x") == (" <b> x", "")


def test_tokens_are_counted_by_where_they_begin() -> None:
    """The token behind the closing tag is the answer's, though it may come in one piece with it."""
    reader = ReasoningReader(is_open=False)
    reader.push("<think>ab", [0, 7])
    assert reader.tokens == 2
    reader.push("</think>c", [9, 17])
    reader.push("d", [18])
    assert reader.tokens == 3


def test_which_models_think() -> None:
    """By their templates; distillations of DeepSeek-R1 name the closing tag alone."""
    assert knows_reasoning(TEMPLATE)
    assert knows_reasoning("{{ content.split('</think>') }}")
    assert not knows_reasoning("{{ messages }}")
    assert leaves_open("<think>a</think><think>")
    assert not leaves_open("<think>a</think>")
    assert not leaves_open("")


# ------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def thinker(tmp_path: Path, engine: FakeEngine, tokenizer: Tokenizer) -> FakeEngine:
    """Serves "m" with Qwen3's kind of template, "r" with DeepSeek-R1's, "off" with the switch off."""
    for name, template in (("m", TEMPLATE), ("r", OPENING), ("off", TEMPLATE)):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, template)
        parser = "none" if name == "off" else "auto"
        engine.views[name] = view(name, tmp_path / name, context=4000, reasoning_parser=parser)
    speak(engine, tokenizer, OUTPUT)
    return engine


def speak(engine: FakeEngine, tokenizer: Tokenizer, text: str) -> None:
    engine.answer = [*tokenizer.encode(text, add_special_tokens=False).ids, 1]


def with_tags(*directories: Path, special: bool = False) -> Tokenizer:
    """Give models' tokenizers the tags as tokens, as Qwen3's has them."""
    for directory in directories:
        path = directory / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.add_tokens([AddedToken(tag, special=special) for tag in TAGS])
        tokenizer.save(str(path))
    return tokenizer


def asked(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    return str(tokenizer.decode(list(engine.submitted[-1].prompt), skip_special_tokens=False))


async def ask(client: AsyncOpenAI, stream: bool, **fields: Any) -> list[tuple[str, str, str, str | None]]:
    """(thoughts, content, arguments of calls, finish reason) of each choice."""
    request = {"model": "m", "messages": CHAT, **fields}
    answer: Any = await client.chat.completions.create(**request, stream=stream)
    if not stream:
        return [
            (
                getattr(choice.message, "reasoning_content", ""),
                choice.message.content or "",
                "".join(call.function.arguments for call in choice.message.tool_calls or ()),
                choice.finish_reason,
            )
            for choice in answer.choices
        ]
    told = [["", "", "", None] for _ in range(fields.get("n", 1))]
    async for chunk in answer:
        for choice in chunk.choices:
            mine: list[Any] = told[choice.index]
            mine[0] += getattr(choice.delta, "reasoning_content", "")
            mine[1] += choice.delta.content or ""
            mine[2] += "".join(call.function.arguments or "" for call in choice.delta.tool_calls or ())
            mine[3] = choice.finish_reason or mine[3]
    return [tuple(mine) for mine in told]  # type: ignore[misc]


@pytest.mark.parametrize("stream", [False, True])
async def test_chats(client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    """Whole and streamed alike, for every choice, whether the model opens its thoughts or its template."""
    assert await ask(client, stream, n=2) == [(THOUGHT, SPOKEN, "", "stop")] * 2
    speak(thinker, tokenizer, OUTPUT.removeprefix("<think>\n"))
    assert await ask(client, stream, model="r") == [(THOUGHT, SPOKEN, "", "stop")]


@pytest.mark.parametrize("stream", [False, True])
async def test_only_where_it_is_known(
    client: AsyncOpenAI, thinker: FakeEngine, model: Path, stream: bool
) -> None:
    """A service may switch it off, and who writes tags that its template does not know writes text."""
    assert await ask(client, stream, model="off") == [("", OUTPUT, "", "stop")]
    thinker.views["m"] = view("m", model, context=4000)
    assert await ask(client, stream) == [("", OUTPUT, "", "stop")]


async def test_in_the_bodies(client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer) -> None:
    """No field without thoughts, null as the content where there is nothing else, and tokens counted."""
    whole = await client.chat.completions.create(model="m", messages=CHAT)
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    reasoning = len(tokenizer.encode(OUTPUT.removesuffix(SPOKEN).rstrip(), add_special_tokens=False).ids)
    assert whole.usage.completion_tokens_details.reasoning_tokens in (reasoning, reasoning + 1)
    cut = await client.chat.completions.create(model="m", messages=CHAT, max_tokens=20)
    message = cut.choices[0].message
    assert (message.content, cut.choices[0].finish_reason) == (None, "length")
    assert THOUGHT.startswith(message.reasoning_content)  # type: ignore[attr-defined]
    assert cut.usage is not None
    assert cut.usage.completion_tokens_details is not None
    assert cut.usage.completion_tokens_details.reasoning_tokens == 20
    speak(thinker, tokenizer, SPOKEN)
    plain = await client.chat.completions.create(model="m", messages=CHAT)
    assert "reasoning_content" not in json.loads(plain.choices[0].message.model_dump_json(exclude_unset=True))
    stream = await client.chat.completions.create(
        model="m", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage async for chunk in stream][-1]
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_behind_thoughts(
    client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    """A call that is only thought of is none."""
    speak(thinker, tokenizer, f"<think>I could {CALL}</think>Well. {CALL}")
    ((thought, said, arguments, reason),) = await ask(client, stream, tools=[NOW])
    assert (thought, said, reason) == (f"I could {CALL}", "Well.", "tool_calls")
    assert json.loads(arguments) == {"zone": "CET"}


@pytest.mark.parametrize("stream", [False, True])
async def test_ends_and_scores(client: AsyncOpenAI, thinker: FakeEngine, stream: bool) -> None:
    """A stop string ends thoughts as it ends text; log-probabilities are of all tokens."""
    assert await ask(client, stream, stop="\n\nI") == [("They greet.", "", "", "stop")]
    assert await ask(client, stream, stop="wörld") == [(THOUGHT, "Hello ", "", "stop")]
    if not stream:
        answer = await client.chat.completions.create(model="m", messages=CHAT, logprobs=True)
        assert answer.choices[0].logprobs is not None
        assert len(answer.choices[0].logprobs.content or ()) == len(thinker.answer)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[1]"),
        ({"structured_outputs": {"regex": "ab+"}}, "abb", "b"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
        ({"structured_outputs": {"grammar": 'start: "x" y\ny: /[0-9]+/'}}, "x12", "x"),
        (
            {"tools": [NOW], "tool_choice": "required"},
            CALL.replace(">{", ">\n{").replace("}<", "}\n<"),
            "now",
        ),
    ],
)
@pytest.mark.parametrize("tags", ["text", "tokens"])
async def test_a_form_is_the_answers(
    client: AsyncOpenAI,
    thinker: FakeEngine,
    tmp_path: Path,
    form: dict[str, Any],
    good: str,
    bad: str,
    tags: str,
) -> None:
    """Thoughts before it are free where the model may think; where it must not, they are not allowed."""
    path = tmp_path / "m" / "tokenizer.json"
    if tags == "tokens":
        with_tags(tmp_path / "m", tmp_path / "r")
    tokenizer = Tokenizer.from_file(str(path))
    reader = LLTokenizer(path.read_text(), n_vocab=400, eos_token=1)
    for name in ("m", "r"):
        thinker.views[name] = view(name, tmp_path / name, vocab=400, context=4000)
    thoughts = '<think>\nHm, {"a": </th\n</think>\n\n'
    cases = (
        ("m", None, {thoughts + good: True, good: True, thoughts + bad: False, bad: False}),
        ("m", False, {thoughts + good: False, good: True, bad: False}),
        ("r", None, {thoughts.removeprefix("<think>\n") + good: True, good: False, thoughts: False}),
    )
    for name, enabled, texts in cases:
        switch = {} if enabled is None else {"chat_template_kwargs": {"enable_thinking": enabled}}
        await ask(client, False, model=name, extra_body={**form, **switch}, max_tokens=1)
        grammar = thinker.submitted[-1].sampling.grammar
        assert grammar is not None
        for text, fits in texts.items():
            matcher = LLMatcher(reader, grammar.text, log_level=0)
            tokens = tokenizer.encode(text, add_special_tokens=False).ids
            assert (matcher.consume_tokens(tokens) and matcher.is_accepting()) is fits, (name, text)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_its_form(
    client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    """The content is what has the form, and nothing else."""
    form = {"response_format": {"type": "json_object"}}
    speak(thinker, tokenizer, 'Hm.</think>{"a": 1}')
    assert await ask(client, stream, model="r", **form) == [("Hm.", '{"a": 1}', "", "stop")]
    speak(thinker, tokenizer, '{"a": 1}')
    assert await ask(client, stream, **form) == [("", '{"a": 1}', "", "stop")]


async def test_what_the_template_is_told(
    client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer
) -> None:
    """Thoughts of earlier turns where it asks for them, and the switch that turns them off."""
    turn = {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}
    await ask(client, False, messages=[*CHAT, turn, *CHAT])
    assert "<assistant><think>\nHm.\n</think>\n\nHi.<user>hello" in asked(thinker, tokenizer)
    await ask(client, False, model="r", messages=[*CHAT, turn, *CHAT])
    assert "Hm." not in asked(thinker, tokenizer)
    speak(thinker, tokenizer, SPOKEN)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert await ask(client, False, extra_body=off) == [("", SPOKEN, "", "stop")]
    assert asked(thinker, tokenizer).endswith("<assistant><think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("begun", "thought", "said"),
    [("<think>\nThey", THOUGHT.removeprefix("They "), SPOKEN), ("<think>x</think>Well", "", None)],
)
async def test_continued_turns(
    client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer, begun: str, thought: str, said: str | None
) -> None:
    """A turn that is continued goes on with thoughts if it was cut in them, else with its answer."""
    rest = OUTPUT.removeprefix("<think>\nThey ")
    speak(thinker, tokenizer, rest)
    messages = [*CHAT, {"role": "assistant", "content": begun}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    (told,) = await ask(client, False, messages=messages, extra_body=extra)
    assert told == (thought, said or rest, "", "stop")


async def test_tags_that_are_special_tokens(client: AsyncOpenAI, thinker: FakeEngine, tmp_path: Path) -> None:
    """They are found, though special tokens have no place in a text."""
    special = with_tags(tmp_path / "m", special=True)
    thinker.views["m"] = view("m", tmp_path / "m", vocab=400, context=4000)
    thinker.answer = [*special.encode(OUTPUT, add_special_tokens=False).ids, 1]
    assert special.token_to_id("</think>") in thinker.answer
    assert await ask(client, True) == [(THOUGHT, SPOKEN, "", "stop")]


# -------------------------------------------------------------------------------------- /v1/responses


async def test_items(client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer) -> None:
    """Thoughts are an item of their own before the message, and come back as one."""
    whole = await client.responses.create(model="m", input="hello")
    reasoning, message = whole.output
    assert reasoning.type == "reasoning"
    assert reasoning.summary == []
    assert reasoning.content is not None
    assert [(part.type, part.text) for part in reasoning.content] == [("reasoning_text", THOUGHT)]
    assert (whole.output_text, message.type) == (SPOKEN, "message")
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    items: Any = [*CHAT, *(item.model_dump() for item in whole.output), *CHAT]
    await client.responses.create(model="m", input=items)
    told = f"<assistant><think>\n{THOUGHT}\n</think>\n\n{SPOKEN}<user>hello"
    assert told in asked(thinker, tokenizer)


async def test_items_with_calls(client: AsyncOpenAI, thinker: FakeEngine, tokenizer: Tokenizer) -> None:
    """Thoughts and the calls behind them are one turn; what others encrypted is left out."""
    items: Any = [
        *CHAT,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"},
        {
            "type": "reasoning",
            "id": "rs_2",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ]
    await client.responses.create(model="m", input=items)
    text = asked(thinker, tokenizer)
    assert "<user>hello<assistant><think>\nHm.\n</think>\n\n<tool_call>" in text
    assert text.count("<assistant>") == 2


@pytest.mark.usefixtures("thinker")
async def test_events(client: AsyncOpenAI) -> None:
    """As OpenAI names them; the client has types for each."""
    events = [event async for event in await client.responses.create(model="m", input="hello", stream=True)]
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.delta", "output_text.done", "completed"),
    ]
    assert {type(event).__name__ for event in events} >= {
        "ResponseReasoningTextDeltaEvent",
        "ResponseReasoningTextDoneEvent",
    }
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT
    assert len(deltas) > 3
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]


@pytest.mark.usefixtures("thinker")
async def test_an_item_that_is_cut(client: AsyncOpenAI) -> None:
    """Thoughts without an answer are not complete."""
    answer = await client.responses.create(model="m", input="hello", max_output_tokens=20)
    assert (answer.status, answer.output_text) == ("incomplete", "")
    assert [(item.type, item.status) for item in answer.output] == [("reasoning", "incomplete")]  # type: ignore[union-attr]

"""Structured outputs over HTTP: what reaches the engine, and that bad or hostile grammars hurt nobody."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI

from seallmd.api.grammar_process import Job, compile_grammar
from seallmd.api.structured import Form, Grammars
from seallmd.core.shapes import LayerShape, ModelShape
from seallmd.errors import RequestError
from tests.api.engine_double import FakeEngine

CHAT = [{"role": "user", "content": "hello"}]
SHAPE = ModelShape("Fake", "float32", 4, (LayerShape(1, 8, 8),), (64,), 320, 200, eos=(1,))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def matches(model: Path, grammar: str, text: str) -> bool:
    """Whether a worker would let a model write exactly this text."""
    tokenizer = LLTokenizer((model / "tokenizer.json").read_text(), n_vocab=320, eos_token=1)
    matcher = LLMatcher(tokenizer, grammar)
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            '{"a": 1}',
            '{"b": 1}',
        ),
        ({"structured_outputs": {"json": SCHEMA}}, '{\n  "a": 1\n}', '{"a": "1"}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":1}', "{}"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"regex": r"\d{3}-[a-c]+"}}, "123-ab", "12-ab"),
        ({"structured_outputs": {"choice": ["yes", 'n"o\n', "wörld"]}}, 'n"o\n', "no"),
        ({"structured_outputs": {"grammar": 'start: "x" y\ny: /[0-9]+/'}}, "x12", "x"),
        ({"structured_outputs": {"grammar": 'root ::= "x" y\ny ::= [0-9]+'}}, "x12", "x"),
    ],
)
async def test_forms(
    client: AsyncOpenAI, engine: FakeEngine, model: Path, fields: dict[str, Any], good: str, bad: str
) -> None:
    """Each way to ask becomes a grammar that lets the right texts through, for both endpoints."""
    await client.chat.completions.create(model="m", messages=CHAT, extra_body=fields)
    await client.completions.create(model="m", prompt="hello", n=2, extra_body={**fields, "ignore_eos": True})
    grammars = {sent.sampling.grammar for sent in engine.submitted}
    assert len(engine.submitted) == 3
    (grammar,) = grammars
    assert grammar is not None
    assert grammar.ends == (1,)
    assert matches(model, grammar.text, good)
    assert not matches(model, grammar.text, bad)


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(" * 3000}},
        {"structured_outputs": {"regex": "a**" + "(b" * 500}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        {"structured_outputs": {"json": {"$ref": "#/nowhere"}}},
        {"structured_outputs": {"grammar": "start: nowhere"}},
        {"structured_outputs": {"grammar": "root ::= ((((("}},
        {"structured_outputs": {"regex": "(?=a)b"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"allOf": [{"not": {}}]}}}},
    ],
)
async def test_bad_forms(client: AsyncOpenAI, engine: FakeEngine, fields: dict[str, Any]) -> None:
    """400 with the field, in one short line, and nothing reaches the engine."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="m", messages=CHAT, extra_body=fields)
    assert caught.value.param in ("response_format", "structured_outputs")
    assert len(caught.value.message) < 600
    assert engine.submitted == []


def test_deep_schemas_are_answers(model: Path) -> None:
    """Nesting without end costs no stack."""
    text = '{"items":' * 20_000 + "{}" + "}" * 20_000
    assert compile_grammar(Job("json", text, str(model), 320, 1)).error


async def test_what_never_ends_is_killed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has a limit, and the next one asks a fresh process."""
    grammars = Grammars(seconds=0.001)
    form = Form("regex", "a+", "structured_outputs")
    with pytest.raises(RequestError, match="too long"):
        await grammars.compile(form, str(model), SHAPE)
    grammars.helper.seconds = 20
    assert "a+" in await grammars.compile(form, str(model), SHAPE)
    monkeypatch.setattr(grammars.helper, "ask", None)  # what was compiled once is remembered
    assert "a+" in await grammars.compile(form, str(model), SHAPE)
    await grammars.close()


async def test_the_queue_is_bounded(model: Path) -> None:
    """Who waits for the process costs memory: there is room for some."""
    grammars = Grammars()
    forms = [Form("regex", f"a{{{i}}}", "structured_outputs") for i in range(1, 60)]
    outcomes = await asyncio.gather(
        *(grammars.compile(form, str(model), SHAPE) for form in forms), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    assert len(refused) == 59 - 32
    assert {error.status for error in refused} == {503}
    await grammars.close()

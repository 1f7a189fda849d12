"""Ollama's chats: tools, calls and their results, and what models think."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.api.engine_double import SPOKEN, FakeEngine, view, write_model
from tests.api.test_ollama import HELLO, call, lines
from tests.api.test_reasoning import CALL, NOW, OUTPUT, TEMPLATE, THOUGHT, asked, speak

TOLD = {"index": 0, "name": "now", "arguments": {"zone": "CET"}}


@pytest.fixture(autouse=True)
def long_context(engine: FakeEngine, model: Path, tmp_path: Path) -> None:
    """Explaining tools takes some words. "t" thinks."""
    write_model(tmp_path, TEMPLATE)
    engine.views["m"] = view("m", model, context=4000)
    engine.views["t"] = view("t", tmp_path, context=4000, pooling="mean")


async def ask(url: str, stream: bool, **fields: Any) -> tuple[dict[str, Any], str]:
    """The message, put together from the lines of a stream if there is one, and why it ended."""
    body = {"model": "m", "messages": HELLO, "stream": stream, **fields}
    if not stream:
        status, answer = await call(url + "/api/chat", body)
        assert status == 200, answer
        return answer["message"], answer["done_reason"]
    parts = await lines(url + "/api/chat", body)
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for part in parts:
        for name, value in part["message"].items():
            if name != "role":
                message[name] = message.get(name, type(value)()) + value
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    return message, parts[-1]["done_reason"]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls(url: str, engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    """Each call comes whole, its arguments as values; text stays beside it. Without tools it is all text."""
    speak(engine, tokenizer, f"Well. {CALL}{CALL}")
    message, reason = await ask(url, stream, tools=[NOW])
    assert (message["content"], reason) == ("Well.", "stop")
    assert [made["function"] for made in message["tool_calls"]] == [TOLD, {**TOLD, "index": 1}]
    assert "now" in asked(engine, tokenizer)
    message, _ = await ask(url, stream)
    assert message == {"role": "assistant", "content": f"Well. {CALL}{CALL}"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cut(url: str, engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    """Half of the arguments are no arguments: nobody is asked to call with them, and nothing is lost."""
    text = CALL.removesuffix('ET"}}</tool_call>')
    speak(engine, tokenizer, text)
    limit = len(tokenizer.encode(text, add_special_tokens=False).ids)
    message, reason = await ask(url, stream, tools=[NOW], options={"num_predict": limit})
    assert (message["content"], reason) == ('{"name": "now", "arguments": {"zone": "C', "length")
    assert "tool_calls" not in message


async def test_calls_in_the_history(url: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """They and their results reach the template, with the ids that some templates insist on."""
    directory = Path(engine.views["t"].directory or "")
    template = (
        "{# tools #}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.name }}={{ m.tool_call_id }}"
        "{% for c in m.tool_calls or () %}{{ c.id }}:{{ c.function.name }}{{ c.function.arguments.zone }}"
        "{% endfor %}{% endfor %}"
    )
    write_model(directory, template)
    made = [{"function": {"name": name, "arguments": {"zone": name}}} for name in ("a", "b")]
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [*made, {**made[0], "id": "own"}]},
        *({"role": "tool", "tool_name": name, "content": f"{name}!"} for name in ("a", "b")),
        {"role": "tool", "tool_call_id": "own", "content": "c!"},
    ]
    await ask(url, False, model="t", messages=messages)
    told = "<user>hello=<assistant>=call00001:aacall00002:bbown:aa"
    told += "<tool>a!a=call00001<tool>b!b=call00002<tool>c!=own"
    assert asked(engine, tokenizer) == told


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking(url: str, engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    """Thoughts have a field of their own, calls are looked for behind them."""
    speak(engine, tokenizer, OUTPUT)
    message, _ = await ask(url, stream, model="t")
    assert message == {"role": "assistant", "content": SPOKEN, "thinking": THOUGHT}
    speak(engine, tokenizer, f"<think>{CALL}</think>{CALL}")
    message, _ = await ask(url, stream, model="t", tools=[NOW])
    assert (message["content"], message["thinking"]) == ("", CALL)
    assert [made["function"] for made in message["tool_calls"]] == [TOLD]


@pytest.mark.parametrize(("think", "closed"), [(None, False), (True, False), ("high", False), (False, True)])
async def test_the_switch(
    url: str, engine: FakeEngine, tokenizer: Tokenizer, think: object, closed: bool
) -> None:
    """It reaches the template, which decides unless told; thoughts of earlier turns do so, too."""
    earlier = {"role": "assistant", "content": "Hi.", "thinking": "Hm."}
    await ask(url, False, model="t", messages=[*HELLO, earlier, *HELLO], think=think)
    text = asked(engine, tokenizer)
    assert "<assistant><think>\nHm.\n</think>\n\nHi." in text
    assert text.endswith("</think>\n\n") is closed


async def test_generate(url: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """A prompt that goes through a template is a chat: thoughts are told apart; a raw one is just text."""
    speak(engine, tokenizer, OUTPUT)
    body = {"model": "t", "prompt": "hello", "stream": False}
    _, answer = await call(url + "/api/generate", {**body, "think": True})
    assert (answer["response"], answer["thinking"]) == (SPOKEN, THOUGHT)
    _, answer = await call(url + "/api/generate", {**body, "raw": True})
    assert answer["response"] == OUTPUT
    assert "thinking" not in answer


async def test_capabilities(url: str, engine: FakeEngine) -> None:
    """What clients look up before they offer tools, or a switch for thoughts."""
    _, shown = await call(url + "/api/show", {"model": "t"})
    assert shown["capabilities"] == ["completion", "tools", "thinking", "embedding"]
    directory = Path(engine.views["t"].directory or "")
    engine.views["t"] = view("t", directory, tool_parser="none", reasoning_parser="none")
    _, shown = await call(url + "/api/show", {"model": "t"})
    assert shown["capabilities"] == ["completion"]

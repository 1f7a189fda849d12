"""What cannot be served: one clear answer in OpenAI's shape, and no work for the engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from seallmd.errors import ConfigError, RequestError
from tests.api.engine_double import FakeEngine, view

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


async def post(url: str, data: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/json", **headers}
        async with session.post(url, data=data, headers=headers) as response:
            body = await response.read()
    assert len(body) < 8192
    assert response.headers["Server"] == "seallmd", "versions are nobody's business"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return response.status, error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [[1, 2], [3, 1 << 40]]}, "prompt[1][1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"prompt": ["x"] * 9, "n": 128}, "n"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"echo": "yes"}, "echo"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": [5] * 9, "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [320]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"request_id": "a b"}, "request_id"),
        ({"priority": 1}, "priority"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
async def test_bad_completion_fields(
    url: str, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    """Wrong types, ranges, unknown tokens and unserved constraints: 400 that names the field."""
    body = {"model": "m", "prompt": "hello", **fields}
    status, error = await post(url + COMPLETIONS, json.dumps(body).encode())
    assert (status, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0] in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"max_tokens": 9, "max_completion_tokens": 3, "min_tokens": 5}, "min_tokens"),
    ],
)
async def test_bad_chat_fields(
    url: str, engine: FakeEngine, fields: dict[str, Any], param: str | None
) -> None:
    """The same for chats."""
    status, error = await post(url + CHAT, json.dumps({"model": "m", "messages": HELLO, **fields}).encode())
    assert status == 400
    assert error["param"] == param or param is None, error
    assert engine.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model":"m","prompt":"x","temperature":NaN}',
        b'{"model":"m","prompt":"x","temperature":Infinity}',
        b'{"model":"m","prompt":"x","repetition_penalty":1e999}',
        b'{"model":"m","prompt":"\\ud800"}',
        b'{"model":"m","prompt":"\xff"}',
        b'{"model":"m","prompt":"x","tools":' + b"[" * 30000,
        b'{"model":"m","prompt":' + b"[" * 30000 + b"]" * 30000 + b"}",
    ],
)
async def test_broken_bodies(url: str, engine: FakeEngine, body: bytes) -> None:
    """What is no JSON, or JSON made to hurt, is a 400 like any other."""
    for path in (COMPLETIONS, CHAT):
        status, error = await post(url + path, body)
        assert status == 400, error
    assert engine.submitted == []


async def test_harmless_values_are_accepted(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """Clients fill in defaults and nulls, and send fields that nobody knows."""
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "logit_bias", "stream_options", "user", "tools"))
    extra = {
        **nulls,
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "tool_choice": "auto",
        "service_tier": "auto",
        "made_up": {"x": [1]},
    }
    await client.chat.completions.create(model="m", messages=HELLO, extra_body=extra)
    await client.completions.create(
        model="m", prompt="x", extra_body={**nulls, "best_of": 1, "echo": False, "suffix": None}
    )
    assert len(engine.submitted) == 2


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [([5] * 200, None), ([5] * 201, None), ([5] * 150, 51), ("hello " * 100, 1)]
)
async def test_context_overflow(client: AsyncOpenAI, prompt: object, max_tokens: int | None) -> None:
    """The numbers are in the message: people decide by them what to cut."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="m", prompt=prompt, max_tokens=max_tokens)
    assert caught.value.code == "context_length_exceeded"
    assert "200 tokens" in caught.value.message
    if isinstance(prompt, list):
        assert str(len(prompt)) in caught.value.message


async def test_context_can_be_filled(client: AsyncOpenAI) -> None:
    """The limit itself is allowed."""
    answer = await client.completions.create(model="m", prompt=[5] * 190, max_tokens=10)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 200


async def test_models(client: AsyncOpenAI) -> None:
    """All configured services are listed; a name that is none is a 404 with OpenAI's code everywhere."""
    assert [card.id async for card in client.models.list()] == ["m", "gone", "young"]
    card = await client.models.retrieve("m")
    assert (card.object, card.created, card.max_model_len) == ("model", 1_700_000_000, 200)
    for call in (
        client.models.retrieve("other"),
        client.completions.create(model="other", prompt="x"),
        client.chat.completions.create(model="../m", messages=HELLO),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert caught.value.code == "model_not_found"


async def test_refused_model(client: AsyncOpenAI) -> None:
    """The reason, and no retries: it will not change by itself."""
    with pytest.raises(openai.InternalServerError, match="no such architecture") as caught:
        await client.completions.create(model="gone", prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_model_that_is_still_examined(client: AsyncOpenAI, engine: FakeEngine, model: Path) -> None:
    """At start a request answers late instead of failing, and its model goes before others."""

    def hurry(name: str) -> None:
        engine.views[name] = view(name, model)

    engine.hurry = hurry  # type: ignore[method-assign]
    answer = await client.completions.create(model="young", prompt="x")
    assert answer.choices[0].text


@pytest.mark.parametrize("retry_after", [None, 2.5])
async def test_engine_refuses(client: AsyncOpenAI, engine: FakeEngine, retry_after: float | None) -> None:
    """The engine's own refusal keeps its status and code, and steers the client's retries."""
    engine.refusal = RequestError("too many wait", status=503, code="overloaded", retry_after=retry_after)
    with pytest.raises(openai.InternalServerError, match="too many wait") as caught:
        await client.completions.create(model="m", prompt="x", stream=True)
    headers = caught.value.response.headers
    assert headers.get("Retry-After") == (None if retry_after is None else "3")
    assert headers["x-should-retry"] == ("false" if retry_after is None else "true")


async def test_second_prompt_refused(client: AsyncOpenAI, engine: FakeEngine) -> None:
    """When a later prompt is refused, those that had started are cancelled."""
    engine.pause()
    submit = engine.submit

    def refuse_second(generations: Any) -> Any:
        if engine.submitted:
            raise RequestError("too many wait", status=503)
        return submit(generations)

    engine.submit = refuse_second  # type: ignore[method-assign]
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="m", prompt=["a", "b"], n=2)
    assert engine.cancelled == [1, 2]


async def test_unexpected_failure(
    client: AsyncOpenAI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect is told to the log with its traceback, and to the client without any detail."""
    engine.refusal = ZeroDivisionError("secret /path at 0x7f00")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="m", prompt="x")
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.response.text
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


async def test_http_refusals(url: str, engine: FakeEngine) -> None:
    """Unknown paths, methods, sizes and types have the same shape as the rest."""
    async with aiohttp.ClientSession() as session:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", COMPLETIONS, 405),
            ("POST", "/v1/models", 405),
        ):
            async with session.request(method, url + path) as response:
                assert response.status == status
                assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
                assert ("Allow" in response.headers) == (status == 405)
    body = json.dumps({"model": "m", "prompt": "x" * (1 << 16)}).encode()
    assert (await post(url + COMPLETIONS, body))[0] == 413
    body = json.dumps({"model": "m", "prompt": "x"}).encode()
    assert (await post(url + COMPLETIONS, body, **{"Content-Type": "text/plain"}))[0] == 415
    assert engine.submitted == []


async def test_missing_content_type(port: int) -> None:
    """Hand-made clients leave it out."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "m", "prompt": "x"}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()


async def test_health(url: str, engine: FakeEngine) -> None:
    """200 only when every device is up; otherwise the reason."""
    async with aiohttp.ClientSession() as session:
        async with session.get(url + "/health") as response:
            assert response.status == 200
        engine.device_state = "lost"
        async with session.get(url + "/health") as response:
            assert response.status == 503
            assert "device 0 is lost" in await response.text()


async def test_unix_socket(runner: web.AppRunner, tmp_path: Path, engine: FakeEngine) -> None:
    """The same API on a Unix socket; a living one is not taken over, a stale one is."""
    path = str(tmp_path / "http.sock")
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
        session.get("http://localhost/v1/models") as response,
    ):
        assert response.status == 200
    with pytest.raises(ConfigError, match="another seallmd answers"):
        await start_http(engine, HttpSettings(host="", socket=path))
    await runner.cleanup()
    again = await start_http(engine, HttpSettings(host="", socket=path))
    await again.cleanup()


async def test_port_in_use(port: int, engine: FakeEngine) -> None:
    """A port that is taken is one clear line, not a traceback."""
    with pytest.raises(ConfigError, match="cannot listen"):
        await start_http(engine, HttpSettings(port=port))


def test_settings_refuse_what_they_do_not_know() -> None:
    """A misspelt key would silently leave its default in force."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"prot": 1}, HttpSettings)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"port": 70000}, HttpSettings)

"""Ollama's API over the wire: shapes, streams, options, loading and unloading, errors."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer

from seallmd.api.keys import Key, Keyring
from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from seallmd.core.events import Finish
from tests.api.engine_double import SPOKEN, TEMPLATE, FakeEngine, view

HELLO = [{"role": "user", "content": "hello"}]


async def call(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """GET, or POST of a body; the JSON document that comes back."""
    async with aiohttp.ClientSession() as session:
        method = "GET" if body is None else "POST"
        async with session.request(method, url, json=body) as response:
            return response.status, json.loads(await response.read())


async def lines(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson")
        return [json.loads(line) for line in (await response.text()).splitlines()]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_greeting(engine: FakeEngine, method: str) -> None:
    """Ollama's command line asks for / first, web interfaces compare the words; no key is needed."""
    runner = await start_http(engine, HttpSettings(port=0), keyring=Keyring([Key(name="a", key="sk-" * 9)]))
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    async with aiohttp.ClientSession() as session, session.request(method, url) as response:
        assert (response.status, response.content_type) == (200, "text/plain")
        assert await response.text() == ("Ollama is running" if method == "GET" else "")
    await runner.cleanup()


async def test_chat_stream(url: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Streams are the default: a line for each piece, and the last one has the figures."""
    *parts, last = await lines(url + "/api/chat", {"model": "m:latest", "messages": HELLO})
    assert "".join(part["message"]["content"] for part in parts) == SPOKEN
    assert len(parts) > 3
    assert all(part["message"]["role"] == "assistant" and part["done"] is False for part in parts)
    assert (last["model"], last["done"], last["done_reason"]) == ("m:latest", True, "stop")
    assert last["message"] == {"role": "assistant", "content": ""}
    assert last["eval_count"] == len(engine.answer)
    prompt = engine.submitted[0].prompt
    assert last["prompt_eval_count"] == len(prompt)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"] - 2 > 0
    assert tokenizer.decode(list(prompt), skip_special_tokens=False) == "<s><user>hello\n<assistant>"


async def test_a_message_without_content(url: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """Go takes a null for an empty text, and so does Ollama."""
    messages = [*HELLO, {"role": "assistant", "content": None, "images": None}]
    await lines(url + "/api/chat", {"model": "m", "messages": messages})
    text = tokenizer.decode(list(engine.submitted[0].prompt), skip_special_tokens=False)
    assert text == "<s><user>hello\n<assistant>\n<assistant>"


async def test_generate(url: str, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    """A prompt goes through the template with its system message; raw goes as it is."""
    body = {"model": "m", "prompt": "hello", "system": "be brief", "stream": False}
    status, answer = await call(url + "/api/generate", body)
    assert (status, answer["response"], answer["done"], answer["done_reason"]) == (200, SPOKEN, True, "stop")
    assert answer["created_at"].endswith("Z")
    await call(url + "/api/generate", {"model": "m", "prompt": "hello", "stream": False, "raw": True})
    texts = [tokenizer.decode(list(g.prompt), skip_special_tokens=False) for g in engine.submitted]
    assert texts == ["<s><system>be brief\n<user>hello\n<assistant>", "<s>hello"]


async def test_options(url: str, engine: FakeEngine) -> None:
    """Every option arrives; what Ollama would choose itself is chosen as it does."""
    options = {
        "temperature": 0,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 42,
        "num_predict": 9,
        "stop": ["never"],
        "repeat_penalty": 1.5,
        "num_ctx": 8192,
        "num_gpu": 99,
    }
    body = {"model": "m", "prompt": "hello", "raw": True, "stream": False}
    _, answer = await call(url + "/api/generate", {**body, "options": options})
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 9)
    s = engine.submitted[0].sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.repetition_penalty) == (
        0,
        7,
        0.5,
        0.25,
        42,
        1.5,
    )
    await call(url + "/api/generate", body)
    s = engine.submitted[1].sampling
    assert (s.temperature, s.top_k, s.top_p, s.repetition_penalty) == (0.8, 40, 0.9, 1.0)
    _, answer = await call(url + "/api/generate", {**body, "options": {"stop": "wörld"}})
    assert (answer["response"], answer["done_reason"]) == ("Hello ", "stop")


@pytest.mark.parametrize("limit", [-1, -2, 0, 100000])
async def test_more_than_fits(url: str, engine: FakeEngine, limit: int) -> None:
    """num_predict without a bound, or beyond the context, is what the context leaves."""
    body = {"model": "m", "prompt": "hello", "options": {"num_predict": limit}, "stream": False}
    assert (await call(url + "/api/generate", body))[0] == 200
    generation = engine.submitted[0]
    assert generation.max_tokens == 200 - len(generation.prompt)


async def test_lists(url: str, engine: FakeEngine, model: Path) -> None:
    """tags has what can be asked for, ps what is on a device."""
    engine.views["asleep"] = view("asleep", model)
    engine.states["asleep"] = {"state": "absent", "devices": ()}
    _, tags = await call(url + "/api/tags")
    assert [card["name"] for card in tags["models"]] == ["m", "young", "asleep"]
    card = tags["models"][0]
    assert card["details"]["family"] == "Fake"
    assert card["details"]["quantization_level"] == "F32"
    assert len(card["digest"]) == 64
    _, running = await call(url + "/api/ps")
    (card,) = running["models"]
    assert (card["name"], card["context_length"], card["size_vram"]) == ("m", 200, 4096 + 1024)
    assert set((await call(url + "/api/version"))[1]) == {"version"}


@pytest.mark.parametrize(("path", "empty"), [("generate", {"prompt": ""}), ("chat", {"messages": []})])
async def test_load_and_unload(url: str, engine: FakeEngine, path: str, empty: dict[str, Any]) -> None:
    """Nothing to answer means load, or with keep_alive 0 unload; nothing is generated."""
    for keep_alive, reason in ((None, "load"), ("5m", "load"), (-1, "load"), (0, "unload"), ("0s", "unload")):
        status, answer = await call(f"{url}/api/{path}", {"model": "m", "keep_alive": keep_alive, **empty})
        assert (status, answer["done"], answer["done_reason"]) == (200, True, reason)
    assert (engine.loaded, engine.evicted, engine.submitted) == (["m"] * 3, ["m"] * 2, [])


async def test_unload_after_the_answer(url: str, engine: FakeEngine, model: Path) -> None:
    """keep_alive 0 with a prompt: first the answer; a pinned model stays whatever a client says."""
    engine.views["pinned"] = view("pinned", model, pinned=True)
    for name in ("m", "pinned"):
        body = {"model": name, "prompt": "hello", "keep_alive": 0, "stream": False}
        assert (await call(url + "/api/generate", body))[1]["response"] == SPOKEN
    assert engine.evicted == ["m"]
    status, answer = await call(url + "/api/generate", {"model": "pinned", "keep_alive": 0})
    assert (status, answer) == (403, {"error": "the model 'pinned' is pinned"})


@pytest.mark.parametrize(
    ("path", "fields", "status", "part"),
    [
        ("chat", {"model": "other"}, 404, "'other' does not exist"),
        ("chat", {"model": "gone"}, 503, "no such architecture"),
        ("chat", {"format": "xml"}, 400, "format"),
        ("chat", {"tools": [{}]}, 400, "tools"),
        ("chat", {"think": True}, 400, "does not support thinking"),
        ("chat", {"think": "deeply"}, 400, "think"),
        ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "name"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, 400, "name"),
        ("generate", {"prompt": "x", "raw": True, "think": True}, 400, "think"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, 400, "images"),
        ("chat", {"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ("generate", {"images": ["aa"]}, 400, "images"),
        ("generate", {"suffix": "x"}, 400, "suffix"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system"),
        ("generate", {"prompt": "x", "options": {"mirostat": 1}}, 400, "mirostat"),
        ("generate", {"prompt": "x", "options": {"temperature": 3}}, 400, "temperature"),
        ("generate", {"prompt": "x", "keep_alive": "soon"}, 400, "keep_alive"),
        ("generate", {"prompt": "x", "keep_alive": "1" * 4000 + "!"}, 400, "keep_alive"),
        ("generate", {"prompt": "hello " * 300}, 400, "context length"),
        ("nothing", {}, 404, "no such path"),
    ],
)
async def test_errors(
    url: str, engine: FakeEngine, path: str, fields: dict[str, Any], status: int, part: str
) -> None:
    """In Ollama's shape: one string. What would change the answer and is not served is refused."""
    body = {"model": "m", **({"messages": HELLO} if path == "chat" else {}), **fields}
    got, answer = await call(f"{url}/api/{path}", body)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert part in answer["error"]
    assert engine.submitted == []


@pytest.mark.parametrize("wanted", ["json", {"type": "object", "properties": {"a": {"type": "null"}}}])
async def test_format(url: str, engine: FakeEngine, wanted: object) -> None:
    """A form of the answer becomes a grammar, as in OpenAI's API."""
    await lines(url + "/api/chat", {"model": "m", "messages": HELLO, "format": wanted})
    await lines(url + "/api/generate", {"model": "m", "prompt": "x", "raw": True, "format": wanted})
    grammars = [sent.sampling.grammar for sent in engine.submitted]
    assert grammars[0] is not None
    assert grammars[0] == grammars[1]
    assert ('"a"' in grammars[0].text) is isinstance(wanted, dict)


async def test_failure_in_mid_stream(url: str, engine: FakeEngine) -> None:
    """An error after the first line is a line."""
    engine.failing, engine.fail_after = Finish(0, "failed", "the worker died", "worker_lost", 503), 5
    *parts, last = await lines(url + "/api/chat", {"model": "m", "messages": HELLO})
    assert parts
    assert last == {"error": "the worker died"}


@pytest.mark.parametrize(("headers", "status"), [({}, 200), ({"Origin": "http://localhost:3000"}, 415)])
async def test_curl_without_a_type(
    url: str, engine: FakeEngine, headers: dict[str, str], status: int
) -> None:
    """Ollama's documentation shows `curl -d`, which says that it sends a form; web pages may not."""
    form = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    body = json.dumps({"model": "m", "prompt": "hello"}).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/api/generate", data=body, headers=form) as response,
    ):
        assert response.status == status
    assert len(engine.submitted) == (status == 200)


@pytest.mark.parametrize("field", ["model", "name"])
async def test_show(url: str, engine: FakeEngine, field: str) -> None:
    """What clients look up before they ask: sizes, what it can do, its template. Nothing is woken."""
    status, shown = await call(url + "/api/show", {field: "m:latest"})
    assert status == 200
    assert shown["capabilities"] == ["completion", "tools"]
    assert shown["model_info"]["Fake.context_length"] == 200
    assert shown["model_info"]["Fake.embedding_length"] == 4
    assert shown["template"] == TEMPLATE
    assert (engine.loaded, engine.submitted) == ([], [])
    assert (await call(url + "/api/show", {}))[0] == 400
    assert (await call(url + "/api/show", {"model": "nobody"}))[0] == 404


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        *(("10m", 600.0), ("1h30m", 5400.0), (3600, 3600.0), (-1, 0.0), ("-1s", 0.0), ("250ms", 0.25)),
        *((1e300, 3.2e9), ("9" * 400 + "h", 3.2e9)),  # a time that no calendar has
    ],
)
async def test_keep_alive(url: str, engine: FakeEngine, keep_alive: object, seconds: float) -> None:
    """How long the model stays is the client's to say; negative is for good, none says nothing."""
    body = {"model": "m", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
    assert (await call(f"{url}/api/generate", {**body, "keep_alive": keep_alive}))[0] == 200
    assert engine.kept == {"m": seconds}
    engine.kept.clear()
    assert (await call(f"{url}/api/generate", body))[0] == 200
    assert engine.kept == {}


async def test_ps_tells_when_a_model_leaves(url: str, engine: FakeEngine) -> None:
    """As `ollama ps` shows it."""
    engine.states["m"] = {"expires_seconds": 60.0}
    _, answer = await call(f"{url}/api/ps")
    (model,) = [model for model in answer["models"] if model["name"] == "m"]
    left = datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=50) < left <= timedelta(seconds=60)

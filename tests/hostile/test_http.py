"""HTTP made to hurt, byte by byte: refused, briefly, and the next client is served.

SECURITY.md says which known holes of other servers each test stands for.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
from typing import Any

import pytest

from tests.api.engine_double import FakeEngine

GOOD = json.dumps({"model": "m", "prompt": "x", "max_tokens": 2}).encode()
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/api/generate", "/api/chat")
ADDRESS = re.compile(rb"0x[0-9a-f]{6,}|/(?:usr|home|tmp|root|proc|dev|lib)/")


async def send(port: int, data: bytes) -> bytes:
    """Some bytes, and all that comes back until the server hangs up; reading ends with our own end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(body: bytes = GOOD, *headers: str, path: str = PATHS[0], host: str = "localhost") -> bytes:
    """A request as bytes; Content-Length is there unless a header says how the body ends."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close"]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def status_of(answer: bytes) -> int:
    """The status; 0 when the server only hung up."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


async def check_served(port: int) -> None:
    """An honest client gets its answer."""
    assert status_of(await send(port, request())) == 200


@pytest.mark.parametrize(
    "data",
    [
        request(GOOD, "X: " + "a" * (1 << 17)),
        request(GOOD, *(f"X{i}: 1" for i in range(20_000))),
        request(path="/" + "a" * (1 << 17)),
        b"POST " + b"\x00" * 1000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        request(GOOD, "Content-Length: -5"),
        request(GOOD, "Content-Length: 99999999999999999999"),
        request(GOOD, "Content-Length: 1e3"),
        request(GOOD, "Content-Length: 10", "Content-Length: 57"),
        request(b"FFFFFFFFFFFFFFFFF\r\n" + GOOD, "Transfer-Encoding: chunked"),
        request(b"-1\r\n" + GOOD, "Transfer-Encoding: chunked"),
        request(b"5;" + b"x" * (1 << 17) + b"\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        request(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5"),
        request(GOOD, "Transfer-Encoding: chunked, chunked"),
        request(GOOD, "X\x00: 1"),
        request(GOOD, "X : 1"),
    ],
)
async def test_malformed_requests(port: int, engine: FakeEngine, data: bytes) -> None:
    """Giant heads, two lengths at once, sizes that overflow: 4xx or a hang-up, never two meanings."""
    answer = await send(port, data)
    assert status_of(answer) in (0, 400, 404, 413, 414, 431), answer[:200]
    assert len(answer) < 8192
    assert not ADDRESS.search(answer)
    assert engine.submitted == []
    await check_served(port)


async def test_many_small_chunks(port: int, engine: FakeEngine) -> None:
    """A body in 50 000 chunks of a byte is bounded like any other."""
    body = b"".join(b"1\r\n \r\n" for _ in range(70_000)) + b"0\r\n\r\n"
    assert status_of(await send(port, request(body, "Transfer-Encoding: chunked"))) in (400, 413)
    assert engine.submitted == []
    await check_served(port)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_compressed_bodies_are_refused(port: int, engine: FakeEngine, coding: str) -> None:
    """A megabyte of zeros is a kilobyte on the way: nothing is unpacked for a client."""
    body = gzip.compress(b" " * (1 << 24) + GOOD)
    answer = await send(port, request(body, f"Content-Encoding: {coding}"))
    assert status_of(answer) in (400, 413, 415), answer[:200]
    assert engine.submitted == []
    await check_served(port)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost@evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "",
        "[::1",
        "a" * 5000,
    ],
)
async def test_other_hosts(port: int, engine: FakeEngine, host: str) -> None:
    """A name that is not this machine's is refused, however it is dressed up."""
    assert status_of(await send(port, request(host=host))) in (400, 403)
    assert engine.submitted == []


async def test_host_does_not_choose_the_path(port: int) -> None:
    """Routes follow from the request line alone, and a whole URL there does not get around the check."""
    line = b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert b'"data"' not in await send(port, line.replace(b"Host: localhost", b"Host: evil.example"))
    twice = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert status_of(await send(port, twice)) in (200, 400)


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "/dev/random",
        "m/../m",
        "m\x00",
        "file:///etc/passwd",
        "http://x/y",
        "m" * 257,
        "%2e%2e/m",
    ],
)
async def test_model_names_are_keys(port: int, engine: FakeEngine, name: str) -> None:
    """Nothing is looked up by them but the configuration: no path, no URL, no hub."""
    for path in PATHS:
        body = json.dumps({"model": name, "prompt": "x", "messages": [{"role": "user", "content": "x"}]})
        answer = await send(port, request(body.encode(), path=path))
        assert status_of(answer) in (400, 404), (path, answer[:300])
    assert engine.submitted == []


@pytest.mark.parametrize(
    "path", ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fetc", "//v1/models", "/v1/models/%00"]
)
async def test_paths(port: int, path: str) -> None:
    """There are no files behind HTTP."""
    line = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert status_of(await send(port, line.encode())) in (400, 404)


SERVES_NOTHING = {
    "prompt_embeds": "x",
    "lora_path": "../x",
    "chat_template": "{{ 1 }}",
    "logits_processors": ["os.system"],
}


@pytest.mark.parametrize("field", sorted(SERVES_NOTHING))
async def test_fields_that_reach_code_or_files(port: int, engine: FakeEngine, field: str) -> None:
    """Tensors, adapters, templates and code from clients are refused, not ignored."""
    body = {
        "model": "m",
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
        field: SERVES_NOTHING[field],
    }
    for path in PATHS[:2]:
        assert status_of(await send(port, request(json.dumps(body).encode(), path=path))) == 400
    assert engine.submitted == []


async def test_no_url_is_ever_fetched(port: int, engine: FakeEngine) -> None:
    """Pictures and the like by reference: refused before anybody reads the address."""
    content = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    answer = await send(port, request(json.dumps(body).encode(), path=PATHS[1]))
    assert status_of(answer) == 400
    assert engine.submitted == []


# ------------------------------------------------------------------------------------------- fuzzing

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 1e308, -1e308, 0.5, 1e-320),
    *("", "a", "m", "\x00", "\u202e", "\U0001d54f" * 100, "../m", "{{7*7}}", "a" * 5000, "1" * 400),
    *(
        [],
        {},
        [[]],
        [None],
        [[1], [2]],
        {"a": {}},
        [[[[[[[[1]]]]]]]],
        [{}] * 50,
        {"$ref": "#"},
        [1, "a", None],
    ),
]
HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 3},
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
    },
    "/tokenize": {"model": "m", "prompt": "hello"},
    "/detokenize": {"model": "m", "tokens": [5, 6]},
    "/api/generate": {"model": "m", "prompt": "hello", "options": {"num_predict": 3}},
    "/api/chat": {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "options": {"num_predict": 3},
    },
}
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "stream", "stream_options", "user", "cache_salt", "min_tokens"),
    *("ignore_eos", "echo", "suffix", "best_of", "tools", "tool_choice"),
    *("response_format", "chat_template_kwargs", "options", "keep_alive", "format", "raw"),
    *("system", "template", "context", "images", "tokens", "add_special_tokens"),
    *("priority", "service_tier"),
]


def mutate(draw: random.Random, value: Any) -> Any:
    """The value with one thing in it exchanged, added or taken away."""
    if isinstance(value, dict) and value and draw.random() < 0.7:
        key = draw.choice(list(value))
        return {**value, key: mutate(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], mutate(draw, value[at]), *value[at + 1 :]]
    return draw.choice(VALUES)


@pytest.mark.parametrize("path", BODIES)
async def test_fuzzed_bodies(port: int, engine: FakeEngine, path: str) -> None:
    """Hundreds of bodies that are almost right: an answer or a 4xx for each, and nothing stays."""
    draw = random.Random(path)
    for _ in range(250):
        body = mutate(draw, BODIES[path])
        if isinstance(body, dict) and draw.random() < 0.7:
            body = {**body, draw.choice(FIELDS): draw.choice(VALUES)}
        answer = await send(port, request(json.dumps(body).encode(), path=path))
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert status_of(answer) in (200, 400, 404, 413, 415, 422), (body, answer[:300])
        assert not ADDRESS.search(rest), (body, rest[:300])
        if status_of(answer) != 200:
            assert len(rest) < 4096, head
    if engine.live:
        await engine.idle.wait()

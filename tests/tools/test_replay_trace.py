"""The open-loop client against a small server that speaks OpenAI's protocol, in this process."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from seallmd.sim.metrics import Served
from tools.replay_client import Line, is_loopback
from tools.replay_trace import main

TOKENS_PER_WORD, OVERHEAD = 2, 1


class FakeServer:
    """Answers at once, as many pieces as asked for. bodies: of all requests.

    strict: refuse fields that are not OpenAI's. broken: why every request after `healthy` ones fails.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.strict = False
        self.healthy = 1 << 30
        self.broken = "status"

    async def elsewhere(self, _request: web.Request) -> web.Response:
        event = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        return web.Response(body=b"data: " + json.dumps(event).encode() + b"\n\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.strict and "ignore_eos" in body:
            return web.json_response({"error": {"message": "unknown field"}}, status=400)
        if len(self.bodies) > self.healthy and self.broken == "status":
            return web.json_response({"error": {"message": "overloaded"}}, status=503)
        if len(self.bodies) > self.healthy and self.broken == "redirect":
            raise web.HTTPTemporaryRedirect("/elsewhere")  # it would be answered there
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self._events(body):
            await response.write(b"data: " + event + b"\n\n")
        return response

    def _events(self, body: dict[str, Any]) -> list[bytes]:
        if len(self.bodies) > self.healthy and self.broken == "garbage":
            return [b"{not json"]
        if len(self.bodies) > self.healthy and self.broken == "stream":
            return [json.dumps({"error": {"message": "worker died"}}).encode()]
        pieces = [{"choices": [{"index": 0, "text": " x"}]} for _ in range(body["max_tokens"])]
        prompt = len(body["prompt"].split()) * TOKENS_PER_WORD + OVERHEAD
        usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        last = {"choices": [], "usage": usage}
        return [*(json.dumps(event).encode() for event in (*pieces, last)), b"[DONE]"]


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, str]]:
    """A server and its base URL."""
    server = FakeServer()
    application = web.Application()
    application.router.add_post("/v1/completions", server.complete)
    application.router.add_post("/elsewhere", server.elsewhere)
    async with TestServer(application) as running:
        yield server, str(running.make_url("/v1"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twenty requests with prompts of 41 to 79 tokens."""
    rows = "".join(f"{n},{41 + 2 * n},{3 + n % 4}\n" for n in range(20))
    path = tmp_path / "trace.csv"
    path.write_text(f"seconds,prompt_tokens,output_tokens\n{rows}")
    return path


async def replay(url: str, trace: Path, *more: str, report: Path | None = None) -> tuple[int, dict[str, Any]]:
    """The command, in a thread beside the server: its exit code and its report."""
    report = report or trace.with_name("report.json")
    services = ["--service", "chat", url, "m1", "--service", "code", url, "m2"]
    command = [*services, "--trace", str(trace), "--rate", "100", "--seconds", "0.2", "--json", str(report)]
    code = await asyncio.to_thread(main, [*command, *more])
    return code, json.loads(report.read_bytes()) if report.exists() else {}


async def test_sends_the_trace(fake: tuple[FakeServer, str], trace: Path) -> None:
    """Protects the replay: every request once, with the lengths of the trace, and figures over all."""
    server, url = fake
    code, result = await replay(url, trace)
    assert code == 0
    (report,) = result["reports"]
    assert report["overall"]["requests"] == 20
    assert report["overall"]["failed"] == 0
    assert set(report["services"]) == set(result["isolated"]) == {"chat", "code"}
    sent = server.bodies[-20:]
    assert sorted(body["max_tokens"] for body in sent) == sorted(3 + n % 4 for n in range(20))
    assert report["overall"]["output_tokens"] == sum(body["max_tokens"] for body in sent)
    assert {body["model"] for body in sent} == {"m1", "m2"}
    assert all(body["ignore_eos"] for body in sent)
    assert result["late_seconds"] >= 0


async def test_prompts_have_the_wanted_tokens(fake: tuple[FakeServer, str], trace: Path) -> None:
    """Protects calibration: the server's own count of tokens per word and request is found out."""
    server, url = fake
    await replay(url, trace)
    tokens = [len(body["prompt"].split()) * TOKENS_PER_WORD + OVERHEAD for body in server.bodies[-20:]]
    assert sorted(tokens) == [41 + 2 * n for n in range(20)]
    assert len({body["prompt"] for body in server.bodies}) == len(server.bodies)


async def test_a_server_without_ignore_eos(fake: tuple[FakeServer, str], trace: Path) -> None:
    """Protects servers that refuse unknown fields: it is asked without them."""
    server, url = fake
    server.strict = True
    code, _ = await replay(url, trace)
    assert code == 0
    assert not any("ignore_eos" in body for body in server.bodies[-20:])


@pytest.mark.parametrize("broken", ["status", "stream", "garbage", "redirect"])
async def test_failures_are_counted(fake: tuple[FakeServer, str], trace: Path, broken: str) -> None:
    """Protects honest figures: each way to fail is in the report, and in the exit code."""
    server, url = fake
    _, whole = await replay(url, trace)
    calibration = len(server.bodies) - 20
    server.bodies.clear()
    server.healthy, server.broken = calibration + 15, broken
    code, result = await replay(url, trace)
    assert code == 1
    assert result["reports"][0]["overall"]["failed"] == sum(result["errors"].values()) == 5
    assert whole["errors"] == {}


async def test_isolated_times_of_another_run(
    fake: tuple[FakeServer, str], trace: Path, tmp_path: Path
) -> None:
    """Protects comparisons of servers: slowdowns against one and the same T_iso."""
    _, url = fake
    first = tmp_path / "first.json"
    _, one = await replay(url, trace, report=first)
    _, two = await replay(url, trace, "--isolated", str(first))
    assert two["isolated"] == one["isolated"]


async def test_requests_are_bounded(fake: tuple[FakeServer, str], trace: Path) -> None:
    """Protects servers from a trace that is longer than meant."""
    _, url = fake
    _, result = await replay(url, trace, "--requests", "4")
    assert result["reports"][0]["overall"]["requests"] == 4


async def test_a_server_that_is_not_there(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects people from tracebacks."""
    code, _ = await replay("http://127.0.0.1:9/v1", trace)
    assert code == 2
    assert "chat does not answer" in capsys.readouterr().err


async def test_other_machines_are_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects other people's servers from load by mistake: nothing is sent."""
    code, _ = await replay("http://192.0.2.1/v1", trace)
    assert code == 2
    assert "--allow-remote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://localhost/v1", True),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://127.0.0.1@example.org/v1", False),
        ("http://0.0.0.0:8000/v1", False),
        ("http://localhost.example.org/v1", False),
        ("file:///etc/passwd", False),
        ("127.0.0.1:8000", False),
    ],
)
def test_what_loopback_is(url: str, local: bool) -> None:
    """Protects the refusal from names that only look local."""
    assert is_loopback(url) is local


def test_the_line_through_latencies() -> None:
    """Protects T_iso: exact on a line, and no part below zero whatever was measured."""

    def served(prompt: int, output: int, latency: float) -> Served:
        return Served("a", 0.0, prompt, output, array("d"), latency)

    exact = [served(p, o, 0.1 + 0.002 * p + 0.03 * o) for p in (10, 200) for o in (2, 40)]
    line = Line.through(exact)
    assert (line.request, line.prompt_token, line.output_token) == pytest.approx((0.1, 0.002, 0.03))
    assert line.seconds(100, 10) == pytest.approx(0.6)
    falling = Line.through(
        [served(10, 2, 1.0), served(200, 2, 0.5), served(10, 40, 1.1), served(200, 40, 0.6)]
    )
    assert min(falling.request, falling.prompt_token, falling.output_token) >= 0
    assert falling.seconds(50, 10) > 0

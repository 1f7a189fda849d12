"""seallmctl chat, against the real HTTP server with a stand-in for the engine."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import sys
from pathlib import Path

import pytest
from aiohttp import web

from seallmd.api.server import http_addresses
from seallmd.core.events import Finish
from seallmd.ctl import http
from seallmd.ctl.chat import Chat
from seallmd.errors import ControlError
from tests.api.engine_double import SPOKEN, FakeEngine, write_model
from tests.ctl import terminal
from tests.ctl.test_seallmctl import run


async def chat(*arguments: object, stdin: str | bytes = "", encoding: str = "utf-8") -> tuple[int, str, str]:
    """seallmctl chat with something on stdin. encoding: of its stdout."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "seallmd.ctl.main", *(str(argument) for argument in arguments)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    out, err = await process.communicate(stdin.encode() if isinstance(stdin, str) else stdin)
    return process.returncode or 0, out.decode(), err.decode()


async def test_finds_http_by_itself(control: Path, runner: web.AppRunner, engine: FakeEngine) -> None:
    """The control socket is all that has to be known; the Unix socket is taken where there is one."""
    code, out, err = await run("--socket", control, "chat", "m", "--temperature", "0", "hello", "there")
    assert (code, out, err) == (0, SPOKEN + "\n", "")
    assert engine.submitted[0].sampling.temperature == 0
    addresses = list(http_addresses(runner))
    assert [address.split(":")[0] for address in addresses] == ["http", "unix"]
    assert http.choose(addresses).startswith("unix:")


async def test_stdin_and_json(runner: web.AppRunner, engine: FakeEngine) -> None:
    """In a pipe the prompt may come from stdin; --url needs no control socket; programs get figures."""
    code, out, _ = await chat("chat", "m", "--url", http_addresses(runner)[0], "--json", stdin="hello")
    answer = json.loads(out)
    assert (code, answer["content"], answer["finish_reason"]) == (0, SPOKEN, "stop")
    assert answer["usage"]["completion_tokens"] == len(engine.answer)


async def test_text_that_an_encoding_lacks(runner: web.AppRunner) -> None:
    """An answer goes on where the terminal has no such character; a prompt that is no text says so."""
    address = http_addresses(runner)[0]
    code, out, err = await chat("chat", "m", "--url", address, "hello", encoding="ascii")
    assert (code, out, err) == (0, SPOKEN.encode("ascii", "replace").decode() + "\n", "")
    code, out, err = await chat("chat", "m", "--url", address, stdin=b"caf\xe9")
    assert (code, out, err) == (2, "", "seallmctl: the prompt is not UTF-8 text\n")


def test_answers_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was talked into escape codes could write anywhere on the screen."""
    chunk = {"choices": [{"delta": {"content": "a\x1b[2J\x9bb\tc\n"}, "finish_reason": "stop"}]}
    monkeypatch.setattr(http, "stream", lambda *_: (part for part in [chunk]))
    out = io.StringIO()
    assert Chat("", "m", "", {}).say("x", out)["content"] == "a\x1b[2J\x9bb\tc\n"
    assert out.getvalue() == "a[2Jb\tc\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_thoughts_are_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """Who waits sees that something happens; who pipes gets the answer alone."""
    deltas: list[dict[str, str]] = [
        *({"reasoning_content": "Hm\x1b"}, {"reasoning_content": "."}),
        *({"content": "Yes"}, {"content": "."}),
    ]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    monkeypatch.setattr(http, "stream", lambda *_: (part for part in chunks))
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    answer = Chat("", "m", "", {}).say("x", out)
    assert (answer["content"], answer["reasoning_content"]) == ("Yes.", "Hm\x1b.")
    assert out.getvalue() == ("(thinking) Hm.\n\nYes." if terminal else "Yes.")


async def test_the_conversation_is_sent_along(runner: web.AppRunner, engine: FakeEngine) -> None:
    """The second question comes with the first and its answer, and with the system message."""
    conversation = Chat(http_addresses(runner)[1], "m", "be brief", {"max_tokens": 100})
    for prompt in ("one", "two"):
        await asyncio.to_thread(conversation.say, prompt, None)
    tokenizer = write_model(Path(engine.views["m"].directory or ""))
    text = tokenizer.decode(list(engine.submitted[1].prompt), skip_special_tokens=False)
    assert text == f"<s><system>be brief\n<user>one\n<assistant>{SPOKEN}\n<user>two\n<assistant>"


async def test_failures(control: Path, runner: web.AppRunner, engine: FakeEngine) -> None:
    """2 with the server's own words, before and after the first token; 3 when nobody answers."""
    code, out, err = await run("--socket", control, "chat", "other", "hello")
    assert (code, out, err) == (2, "", "seallmctl: the model 'other' does not exist\n")
    engine.failing, engine.fail_after = Finish(0, "failed", "the worker died", "worker_lost", 503), 5
    code, _, err = await run("--socket", control, "chat", "m", "hello")
    assert (code, err) == (2, "seallmctl: the worker died\n")
    await runner.cleanup()
    code, _, err = await run("--socket", control, "chat", "m", "hello")
    assert code == 3
    assert "no HTTP answer" in err
    assert (await run("chat", "m", "hello", "--url", "ftp://x"))[0] == 2


async def test_leaving_ends_the_generation(runner: web.AppRunner, engine: FakeEngine) -> None:
    """Ctrl-C hangs up: nothing is generated for nobody."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 150}
    chunks = http.stream(http_addresses(runner)[0], "/v1/chat/completions", body)
    await asyncio.to_thread(next, chunks)
    engine.pause()
    await asyncio.to_thread(chunks.close)
    await engine.idle.wait()


def test_no_address() -> None:
    """A daemon without HTTP, or one that does not tell."""
    with pytest.raises(ControlError, match="--url"):
        http.choose([])


async def test_a_conversation_on_a_terminal(runner: web.AppRunner, engine: FakeEngine) -> None:
    """Two questions, Ctrl-C in an answer, Ctrl-D: answers come as they are spoken, the exit code is 0."""
    ours, theirs = pty.openpty()
    process = await terminal.start(theirs, "dumb", "chat", "m", "--url", http_addresses(runner)[0])
    screen = b""

    async def until(text: bytes) -> None:
        nonlocal screen
        while text not in screen:
            screen += await asyncio.to_thread(os.read, ours, 1 << 16)
        screen = screen.partition(text)[2]

    await until(b"> ")
    os.write(ours, b"one\n")
    await until(SPOKEN.encode())
    await until(b"> ")
    engine.pause()
    engine.arrived.clear()
    os.write(ours, b"two\n")
    await engine.arrived.wait()
    os.write(ours, b"\x03")
    await until(b"(interrupted)")
    await engine.idle.wait()
    assert engine.cancelled == [2]
    await until(b"> ")
    os.write(ours, b"\x04")
    assert await process.wait() == 0
    os.close(ours)
    os.close(theirs)

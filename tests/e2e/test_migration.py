"""Answers that go on on another device, with real models and processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.daemon import GEMMA, SMOL, Daemon, service

TOKENS = 80
PROMPTS = ["Once upon a time", "The history of the river begins", "1, 2, 3, 4,"]


@pytest.mark.parametrize(("model", "loaded"), [(SMOL, True), (GEMMA, False)])
def test_a_drained_device_hands_on_what_it_runs(tmp_path: Path, model: str, loaded: bool) -> None:
    """Streams that run on a device go on on the other, without an error and with the same tokens.

    Their KV goes with them: the device is empty before they have ended. loaded: by an operator who names the
    other device; else the drain itself sees to that.
    """
    config = '[devices]\nkind = "cpu"\ncpu_workers = 2\nmemory = "1400 MiB"\nhost_kv = "64 MiB"\n'
    config += "[policy]\nreplicate = false\n[replacement]\nenabled = false\n"
    daemon = Daemon(tmp_path, config + service(model, model, dtype="float32", preload=True))
    try:
        daemon.wait_healthy()
        undisturbed = asyncio.run(answers(daemon, model, asyncio.Event()))
        here = daemon.service(model)["device"]
        moved = asyncio.run(drained(daemon, model, here, loaded=loaded))
        assert moved == undisturbed
        status = daemon.service(model)
        assert status["migrations"] == len(PROMPTS)
        assert status["preemptions"] == 0
        assert status["devices"] == [1 - here]
        assert daemon.stop() == 0, daemon.log.read_text()
    finally:
        daemon.kill()


async def drained(daemon: Daemon, model: str, device: int, *, loaded: bool) -> list[str]:
    """The answers, whose device is drained once all have begun."""
    begun = asyncio.Event()
    asked = asyncio.create_task(answers(daemon, model, begun))
    await begun.wait()
    if loaded:
        done = await asyncio.to_thread(daemon.ctl, "load", model, "--device", str(1 - device))
        assert done.returncode == 0, done.stderr
        assert len(daemon.service(model)["devices"]) == 2
    done = await asyncio.to_thread(daemon.ctl, "drain", "--device", str(device))
    assert done.returncode == 0, done.stderr
    assert not asked.done(), "the answers had ended before"
    return await asked


async def answers(daemon: Daemon, model: str, begun: asyncio.Event) -> list[str]:
    """To all prompts at once. begun: set when each of them has its first token."""
    waiting = set(PROMPTS)

    async def ask(prompt: str) -> str:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            waiting.discard(prompt)
            if not waiting:
                begun.set()
        return text

    async with daemon.async_client() as client:
        return await asyncio.gather(*map(ask, PROMPTS))

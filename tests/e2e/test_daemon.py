"""The real daemon as its users meet it: streams, errors, clients that leave, operators, dying workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest

from tests.e2e.daemon import GEMMA, SMOL, Daemon, service
from tools import replay


def held_kv(daemon: Daemon) -> int:
    return sum(device["kv_bytes"] for device in daemon.status()["devices"])


def test_models_are_listed(daemon: Daemon) -> None:
    """Every configured service under its own name."""
    names = [model.id for model in daemon.client().models.list()]
    assert names == [SMOL, GEMMA, "smol-b", "broken"]


def test_a_stream_equals_the_whole_answer(daemon: Daemon) -> None:
    """Same text, usage in the last chunk, and the finish reason once."""
    client = daemon.client()
    ask = {"model": SMOL, "messages": [{"role": "user", "content": "Name three colours."}], "temperature": 0}
    whole = client.chat.completions.create(**ask, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            **ask, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_sampling_is_reproducible_by_seed(daemon: Daemon) -> None:
    """The same seed, the same text, whatever else runs; another seed, another text."""
    client = daemon.client()

    def text(seed: int) -> str:
        done = client.completions.create(
            model=SMOL, prompt="Once upon a time", max_tokens=20, temperature=1.0, top_p=0.95, seed=seed
        )
        return done.choices[0].text

    first = text(1)
    choices = client.completions.create(
        model=SMOL, prompt="Once upon a time", max_tokens=20, top_p=0.95, seed=1, n=3
    ).choices
    assert choices[0].text == first == text(1)
    assert len({choice.text for choice in choices}) == 3


def test_errors_have_their_own_class(daemon: Daemon) -> None:
    """What the official client raises for each kind of mistake, and that nothing is held afterwards."""
    client = daemon.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smol-b", prompt="word " * 1100)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=SMOL, prompt="x", temperature=7)
    with pytest.raises(openai.InternalServerError, match="cannot be served") as refused:
        client.completions.create(model="broken", prompt="x")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert held_kv(daemon) == 0


def test_a_client_that_leaves_frees_its_blocks(daemon: Daemon) -> None:
    """In mid-stream, by closing the connection."""
    with daemon.client().completions.create(
        model=SMOL, prompt="Count: 1, 2, 3,", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        assert held_kv(daemon) > 0
    daemon.until(lambda: held_kv(daemon) == 0, "blocks were freed", 5)


def test_unix_socket_serves_the_same(tmp_path: Path) -> None:
    """HTTP on a Unix socket, beside a control socket; nothing is preloaded, so this starts fast."""
    path = tmp_path / "http.sock"
    config = f'[http]\nsocket = "{path}"\n[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "64 MiB"\n'
    daemon = Daemon(tmp_path, config + service("m", SMOL))
    try:
        daemon.wait_healthy()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://seallmd/v1/models").json()["data"][0]["id"] == "m"
            # 64 MiB cannot hold the model: refused with the reason, never out of memory.
            answer = client.post(
                "http://seallmd/v1/completions", json={"model": "m", "prompt": "x"}, timeout=60
            )
            assert answer.status_code == 503
            assert "MiB" in answer.json()["error"]["message"]
        assert daemon.service("m")["state"] == "refused"
        assert daemon.stop() == 0
        assert not path.exists()
    finally:
        daemon.kill()


def test_load_and_evict_under_traffic(daemon: Daemon) -> None:
    """One service comes and goes while another streams without a failure; freed bytes are really there."""

    async def run() -> list[str]:
        async with daemon.async_client() as client:

            async def stream(index: int) -> str:
                done = await client.completions.create(
                    model=SMOL, prompt=f"Story {index}:", max_tokens=120, extra_body={"ignore_eos": True}
                )
                return str(done.choices[0].finish_reason)

            streams = [asyncio.create_task(stream(i)) for i in range(4)]
            for _ in range(2):
                loaded = await asyncio.to_thread(daemon.ctl, "load", GEMMA, "--json")
                assert loaded.returncode == 0, loaded.stderr
                held = daemon.service(GEMMA)
                before = daemon.status()["devices"][held["device"]]
                assert before["weights_bytes"] >= held["weights_bytes"]
                evicted = await asyncio.to_thread(daemon.ctl, "evict", GEMMA, "--json")
                assert evicted.returncode == 0, evicted.stderr
                after = daemon.status()["devices"][held["device"]]
                assert before["weights_bytes"] - after["weights_bytes"] >= held["weights_bytes"]
            return await asyncio.gather(*streams)

    assert asyncio.run(run()) == ["length"] * 4


def test_more_models_than_fit_are_swapped(daemon: Daemon) -> None:
    """Three services, room for two of them: each answers when asked."""
    client = daemon.client()
    for name in ("smol-b", GEMMA, SMOL, "smol-b"):
        assert client.completions.create(model=name, prompt="Hello", max_tokens=4).choices[0].text


def test_wrong_commands(daemon: Daemon) -> None:
    """One clear line and exit code 2; 3 when nobody answers."""
    for arguments in (("load", "nobody"), ("evict", "nobody"), ("load", "broken"), ("frobnicate",)):
        result = daemon.ctl(*arguments)
        assert result.returncode == 2, arguments
        assert result.stderr.strip()
    nobody = subprocess.run(
        [sys.executable, "-m", "seallmd.ctl.main", "--socket", str(daemon.directory / "none"), "status"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert nobody.returncode == 3
    assert nobody.stderr.count("\n") == 1


def test_kill_9_of_a_worker(daemon: Daemon) -> None:
    """Its requests start over and end well, others go on, its models come back by themselves."""
    assert daemon.ctl("load", SMOL).returncode == 0
    assert daemon.ctl("load", GEMMA).returncode == 0
    places = {name: daemon.service(name)["device"] for name in (SMOL, GEMMA)}
    assert places[SMOL] != places[GEMMA]
    victim = daemon.status()["devices"][places[SMOL]]["pid"]

    async def run() -> list[object]:
        async with daemon.async_client() as client:

            async def ask(model: str, tokens: int) -> object:
                return await client.completions.create(
                    model=model, prompt="Tell me", max_tokens=tokens, extra_body={"ignore_eos": True}
                )

            def both_run() -> bool:
                running = {s["name"]: s["running"] for s in daemon.status()["services"]}
                return running[SMOL] == 2 and running[GEMMA] == 1

            tasks = [asyncio.create_task(ask(*what)) for what in ((SMOL, 400), (SMOL, 400), (GEMMA, 150))]
            await asyncio.to_thread(daemon.until, both_run, "run")
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 3  # type: ignore[attr-defined]
    daemon.until(lambda: daemon.service(SMOL)["state"] == "resident", "the model came back")
    assert daemon.client().completions.create(model=SMOL, prompt="Hi", max_tokens=3).choices[0].text
    assert not psutil.pid_exists(victim)


def test_a_busy_service_spreads_over_idle_devices(tmp_path: Path) -> None:
    """Two replicas answer, the texts are the same as from one, and evict takes both.

    Not where the other device lends its threads: then one replica is as fast.
    """
    config = '[devices]\nkind = "cpu"\ncpu_workers = 2\nmemory = "700 MiB"\nlend_threads = false\n'
    config += "[policy]\nreplicate_seconds = 0.2\n" + service(SMOL, SMOL, preload=True)
    daemon = Daemon(tmp_path, config)
    try:
        daemon.wait_healthy()
        one = daemon.client().completions.create(model=SMOL, prompt="Story:", max_tokens=60, temperature=0)

        async def run() -> list[str]:
            async with daemon.async_client() as client:

                async def ask() -> str:
                    done = await client.completions.create(
                        model=SMOL, prompt="Story:", max_tokens=60, temperature=0
                    )
                    return str(done.choices[0].text)

                tasks = [asyncio.create_task(ask()) for _ in range(16)]
                await asyncio.to_thread(
                    daemon.until, lambda: len(daemon.service(SMOL)["devices"]) == 2, "a second replica", 60
                )
                return await asyncio.gather(*tasks)

        assert set(asyncio.run(run())) == {one.choices[0].text}
        assert daemon.ctl("evict", SMOL).returncode == 0
        assert all(device["weights_bytes"] == 0 for device in daemon.status()["devices"])
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_sigterm_finishes_what_is_in_flight(tmp_path: Path) -> None:
    """New requests are refused, the running one ends well, exit code 0, and the journal replays."""
    config = 'stop_seconds = 200\n[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "800 MiB"\n'
    daemon = Daemon(tmp_path, config + service(SMOL, SMOL, preload=True))
    try:
        daemon.wait_healthy()
        client = daemon.client()

        def refused() -> bool:
            try:
                client.completions.create(model=SMOL, prompt="late", max_tokens=1)
            except openai.InternalServerError as error:
                return "shutting down" in str(error)
            return False

        with client.completions.create(
            model=SMOL, prompt="Go on:", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            chunks = iter(stream)
            next(chunks)
            daemon.process.send_signal(signal.SIGTERM)
            daemon.until(refused, "new requests were refused", 20)
            finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert finish[-1] == "length"
        assert daemon.process.wait(timeout=30) == 0
        assert replay.main([str(daemon.journal), "--check"]) == 0
    finally:
        daemon.kill()


def test_a_second_daemon_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    """Two daemons would fight for the devices: the second says so and exits with 2."""
    config = tmp_path / "seallmd.toml"
    config.write_text(service("m", SMOL))
    result = subprocess.run(
        [sys.executable, "-m", "seallmd", "--config", config, "--control", daemon.control, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "another seallmd" in result.stderr


def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    """File and line, exit code 2, no traceback."""
    config = tmp_path / "seallmd.toml"
    config.write_text("[http]\nprot = 1\n" + service("m", SMOL))
    result = subprocess.run(
        [sys.executable, "-m", "seallmd", "--config", config], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"seallmd: {config}:2: ")
    assert result.stderr.count("\n") == 1


def test_a_request_of_raw_bytes_does_no_harm(daemon: Daemon) -> None:
    """Half a request and a hang-up: the daemon serves on."""
    for data in (b"\x00\xff\x00\n\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
            sock.sendall(data)
    assert json.loads(httpx.get(f"{daemon.url}/health").text)["status"] == "ok"

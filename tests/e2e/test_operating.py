"""The real daemon under an operator's hands: keys, pins, drains, reloads, events, while it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.daemon import SMOL, Daemon, service
from tools import replay

HEAD = '[http]\nkeys = "{keys}"\n[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "1536 MiB"\n'
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789ab"
KEYS = f"""
[[key]]
name = "alice"
key = "{ALICE}"
tier = "priority"
[[key]]
name = "bob"
key = "{BOB}"
models = ["b"]
requests_per_minute = 2
"""


def client(daemon: Daemon, key: str) -> OpenAI:
    return OpenAI(base_url=f"{daemon.url}/v1", api_key=key, max_retries=0, timeout=300)


def ctl(daemon: Daemon, *arguments: str, code: int = 0) -> Any:
    """seallmctl with --json; its document, or its documents."""
    done = daemon.ctl(*arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    return documents if arguments[0] == "events" else documents[0]


def test_an_operators_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One daemon for all of it, because its start is what takes time; at the end its journal replays."""
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    head = HEAD.format(keys=keys)
    daemon = Daemon(tmp_path, head + service("a", SMOL, preload=True))
    monkeypatch.setenv("SEALLMD_API_KEY", ALICE)
    try:
        daemon.wait_healthy()
        daemon.until(lambda: daemon.service("a")["state"] == "resident", "preload")
        check_keys(daemon)
        check_reload_under_load(daemon, head)
        check_pins_and_drains(daemon)
        check_bench(daemon)
        check_looking_on(daemon)
        check_removal(daemon, head)
        assert daemon.stop() == 0
        assert replay.main([str(daemon.journal), "--check"]) == 0
    finally:
        daemon.kill()


def check_keys(daemon: Daemon) -> None:
    """No key, no answer; health needs none; the document of the interface is behind the door too."""
    for path, status in (("/health", 200), ("/metrics", 401), ("/openapi.json", 401), ("/nowhere", 401)):
        assert httpx.get(daemon.url + path).status_code == status
    headers = {"Authorization": f"Bearer {ALICE}"}
    assert "/v1/completions" in httpx.get(f"{daemon.url}/openapi.json", headers=headers).json()["paths"]
    assert [model.id for model in client(daemon, ALICE).models.list()] == ["a"]
    assert list(client(daemon, BOB).models.list()) == []


def check_reload_under_load(daemon: Daemon, head: str) -> None:
    """A service comes in while another one's stream goes on; a wrong file is told with its line."""
    stream = client(daemon, ALICE).completions.create(
        model="a", prompt="Go on:", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    (running,) = ctl(daemon, "requests")
    assert (running["tier"], running["state"], running["service"]) == ("priority", "running", "a")
    file = daemon.directory / "seallmd.toml"
    both = head + service("a", SMOL, preload=True, idle_seconds=3600) + service("b", SMOL)
    file.write_text(both)
    assert ctl(daemon, "reload") == {"changed": ["service a", "service b"], "restart": []}
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == "length"
    bob = client(daemon, BOB)
    daemon.until(lambda: daemon.service("b")["state"] != "probing", "the probe of b")
    assert bob.completions.create(model="b", prompt="Hi", max_tokens=2).usage.completion_tokens <= 2
    with pytest.raises(openai.NotFoundError):
        bob.completions.create(model="a", prompt="Hi")
    bob.completions.create(model="b", prompt="Hi", max_tokens=2)
    with pytest.raises(openai.RateLimitError) as limited:
        bob.completions.create(model="b", prompt="Hi", max_tokens=2)
    assert 0 < int(limited.value.response.headers["Retry-After"]) <= 60
    file.write_text(both + "colour = 1\n")
    refused = ctl(daemon, "reload", code=2)
    assert f"{file}:{len(both.splitlines()) + 1}:" in refused["error"]
    file.write_text(both)
    assert daemon.service("a")["swaps_in"] == 1, "a was loaded again for nothing"


def check_pins_and_drains(daemon: Daemon) -> None:
    """Pins are seen; what is drained says so and ends what it has; undrained, all is as before."""
    ctl(daemon, "pin", "a")
    assert daemon.service("a")["pinned"]
    ctl(daemon, "unpin", "a")
    alice = client(daemon, ALICE)
    ctl(daemon, "drain", "a")
    with pytest.raises(openai.InternalServerError) as refused:
        alice.completions.create(model="a", prompt="Hi", max_tokens=2)
    assert (refused.value.status_code, refused.value.code) == (503, "draining")
    assert refused.value.response.headers["x-should-retry"] == "true"
    ctl(daemon, "undrain", "a")
    ctl(daemon, "drain")
    assert httpx.get(f"{daemon.url}/ready").status_code == 503
    ctl(daemon, "undrain")
    assert httpx.get(f"{daemon.url}/ready").status_code == 200
    ctl(daemon, "drain", "--device", "0")
    assert daemon.status()["devices"][0]["weights_bytes"] == 0
    assert daemon.status()["devices"][0]["drained"]
    ctl(daemon, "drain", "--device", "5", code=2)
    ctl(daemon, "undrain", "--device", "0")
    assert alice.completions.create(model="a", prompt="Hi", max_tokens=2).choices


def check_bench(daemon: Daemon) -> None:
    """Both services, nothing failed, figures that can be true."""
    load = ("--requests", "6", "--clients", "2", "--prompt-tokens", "20", "--output-tokens", "5")
    report = ctl(daemon, "bench", *load)
    assert (report["total"]["requests"], report["total"]["failed"]) == (6, 0)
    assert report["services"].keys() == {"a", "b"}
    assert report["total"]["first_token"]["p50"] <= report["total"]["whole"]["p50"]


def check_looking_on(daemon: Daemon) -> None:
    """Events tell what was done above; the map shows who is where; latencies are there."""
    texts = [event["text"] for event in ctl(daemon, "events", "--last", "1000")]
    for part in ("added to the configuration", "unpin", "undrain device 0", "request", "resident on"):
        assert any(part in text for text in texts), part
    top = ctl(daemon, "top")
    owners = {service for kind, service in top["maps"][0]["cells"] if kind == "weights"}
    assert owners <= {"a", "b"}
    assert owners
    assert top["latencies"]["a"]["ended"] > 0


def check_removal(daemon: Daemon, head: str) -> None:
    """b leaves the file and then the daemon; its memory is free, and its name unknown."""
    (daemon.directory / "seallmd.toml").write_text(head + service("a", SMOL, preload=True, idle_seconds=3600))
    assert ctl(daemon, "reload")["changed"] == ["service b"]
    daemon.until(lambda: [s["name"] for s in daemon.status()["services"]] == ["a"], "the removal of b", 20)
    with pytest.raises(openai.NotFoundError):
        client(daemon, ALICE).completions.create(model="b", prompt="Hi")

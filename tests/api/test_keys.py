"""API keys: the file, who may do what, and limits that official clients understand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from seallmd.api.keys import Key, Keyring, locate_keys, read_keys
from seallmd.api.rates import Rates
from seallmd.api.server import build_app, start_http
from seallmd.api.settings import HttpSettings
from seallmd.errors import ConfigError, RequestError
from tests.api.engine_double import FakeEngine

ALICE = Key(name="alice", key="sk-alice-0123456789", tier="priority")
BOB = Key(
    name="bob",
    sha256=hashlib.sha256(b"sk-bob-0123456789ab").hexdigest(),
    models=("other-*",),
    requests_per_minute=2,
)
CAROL = Key(name="carol", key="sk-carol-0123456789", requests_per_minute=3, tokens_per_minute=100)


def write(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_of_keys(tmp_path: Path) -> None:
    """Plain or hashed; what was presented decides which it is."""
    path = write(tmp_path, f'[[key]]\nname = "bob"\nsha256 = "{BOB.sha256}"\ntier = "flex"\n')
    (key,) = read_keys(path)
    assert (key.name, key.tier, key.models) == ("bob", "flex", ())
    ring = Keyring([key, ALICE])
    assert ring.find("sk-bob-0123456789ab") is key
    assert ring.find("sk-alice-0123456789") is ALICE
    assert ring.find("sk-alice-012345678") is ring.find("") is None
    assert not Keyring().required
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nobody could call"),
        ('[[key]]\nname = "a"\n', "either key or sha256"),
        ('[[key]]\nname = "a"\nkey = "short"\n', "fewer than 16"),
        ('[[key]]\nname = "a b"\nkey = "sk-0123456789abcd"\n', "regex"),
        ('[[key]]\nname = "a"\nkey = "sk-0123456789abcd"\ntier = "gold"\n', "gold"),
        ('[[key]]\nname = "a"\nkey = "sk-0123456789abcd"\n' * 2, "used twice"),
        ('[[key]]\nname = "a"\nkey = "sk-0123456789abcd"\nrpm = 3\n', "rpm"),
        ("[[key]\n", "Expected"),
    ],
)
def test_a_wrong_file_is_refused_without_telling_keys(tmp_path: Path, text: str, words: str) -> None:
    """The reason goes to a log that others may read."""
    with pytest.raises(ConfigError) as caught:
        read_keys(write(tmp_path, text))
    assert words in str(caught.value)
    assert "0123456789abcd" not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """As ssh does."""
    with pytest.raises(ConfigError, match="others may read"):
        read_keys(write(tmp_path, "", mode=0o644))
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none")


def test_where_the_file_is(tmp_path: Path) -> None:
    """As configured, else systemd's credential, else there is none."""
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert locate_keys("", environment) is None
    (tmp_path / "api-keys").touch()
    assert locate_keys("", environment) == tmp_path / "api-keys"
    assert locate_keys("/etc/keys", environment) == Path("/etc/keys")
    assert locate_keys("", {}) is None


# --------------------------------------------------------------------------------------------- limits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_limits_by_the_minute() -> None:
    """A burst of a minute's worth, then an even flow; the wait that is told is the right one."""
    clock = Clock()
    rates = Rates(clock)
    for _ in range(3):
        rates.charge(CAROL, 8, 2)
    with pytest.raises(RequestError) as caught:
        rates.charge(CAROL, 8, 2)
    assert (caught.value.status, caught.value.retry_after) == (429, 20.0)
    clock.now = 20.0
    rates.charge(CAROL, 8, 2)
    assert rates.left(CAROL) == {"requests": (3, 0), "tokens": (100, 90)}


def test_unused_tokens_come_back() -> None:
    """A request is charged for all it may generate, and pays for what it did."""
    rates = Rates(Clock())
    rates.charge(CAROL, 8, 92)
    with pytest.raises(RequestError) as caught:
        rates.charge(CAROL, 8, 2)
    assert caught.value.retry_after == 6.0
    assert rates.left(CAROL)["requests"] == (3, 2), "a refused request was charged"
    rates.give_back(CAROL, 95)
    rates.charge(CAROL, 8, 82)


def test_what_can_never_be_served_is_not_to_be_retried() -> None:
    """A prompt of more than a minute's worth."""
    with pytest.raises(RequestError) as caught:
        Rates(Clock()).charge(CAROL, 101, 0)
    assert caught.value.retry_after is None


def test_an_output_without_a_limit_takes_what_there_is() -> None:
    """A context that is longer than a minute's tokens must not shut a key out; what it uses it pays."""
    clock = Clock()
    rates = Rates(clock)
    assert rates.charge(CAROL, 30, 100) == 100
    with pytest.raises(RequestError) as caught:
        rates.charge(CAROL, 30, 100)
    assert caught.value.retry_after == 18.0, "until there is room for its prompt"
    rates.give_back(CAROL, 100 - 40)
    assert rates.charge(CAROL, 30, 100) == 60
    rates.give_back(CAROL, 60 - 130)
    assert rates.left(CAROL)["tokens"] == (100, 0)
    clock.now = 60.0
    assert rates.left(CAROL)["tokens"] == (100, 30), "70 more than there was are paid first"


# --------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
async def guarded(engine: FakeEngine) -> AsyncIterator[str]:
    """The address of a server that wants keys."""
    settings = HttpSettings(port=0)
    runner = await start_http(engine, settings, keyring=Keyring([ALICE, BOB, CAROL]))
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def client(url: str, key: str, retries: int = 0) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)


async def test_every_route_needs_a_key_unless_it_was_opened(guarded: str, engine: FakeEngine) -> None:
    """Deny is the default: a route that somebody adds later is in this test without being listed."""
    opened = {"/", "/health", "/ready", "/version", "/ui", "/ui/"}  # the page asks for a key itself
    routes = {
        (route.method, route.resource.canonical)
        for route in build_app(engine, HttpSettings()).router.routes()
        if route.resource is not None
    }
    assert len(routes) > 10
    async with aiohttp.ClientSession() as session:
        for method, path in sorted(routes):
            async with session.request(method, guarded + path.replace("{name}", "m")) as response:
                assert (response.status == 401) == (path not in opened), path
        async with session.get(f"{guarded}/nowhere") as response:
            assert response.status == 401, "without a key not even what there is can be learnt"
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_a_key_opens_the_door_and_gives_its_tier(guarded: str, engine: FakeEngine) -> None:
    """And its own part of the prefix cache."""
    async with client(guarded, "sk-alice-0123456789") as alice:
        await alice.completions.create(model="m", prompt="x", max_tokens=3)
    assert (engine.submitted[-1].tier, engine.submitted[-1].salt) == ("priority", "alice/")
    async with client(guarded, "sk-wrong-0123456789") as nobody:
        with pytest.raises(openai.AuthenticationError):
            await nobody.models.list()


async def test_the_same_connection_does_not_lend_its_key(guarded: str) -> None:
    """A request without a key behind one with a key, on one connection, is refused."""
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        headers = {"Authorization": "Bearer sk-alice-0123456789"}
        for given, status in ((headers, 200), ({}, 401), (headers, 200)):
            async with session.get(f"{guarded}/v1/models", headers=given) as response:
                assert response.status == status
                await response.read()


async def test_models_that_a_key_may_not_use_are_not_there(guarded: str, engine: FakeEngine) -> None:
    """Neither in the lists nor by name, in both APIs."""
    headers = {"Authorization": "Bearer sk-bob-0123456789ab"}
    async with client(guarded, "sk-bob-0123456789ab") as bob:
        assert (await bob.models.list()).data == []
        with pytest.raises(openai.NotFoundError):
            await bob.completions.create(model="m", prompt="x")
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(f"{guarded}/api/tags") as response:
            assert await response.json() == {"models": []}
        for model, keep_alive in (("m", 0), ("m", -1), ("m:latest", 0), ("m:latest", -1)):
            body = {"model": model, "keep_alive": keep_alive}
            async with session.post(f"{guarded}/api/generate", json=body) as response:
                assert response.status == 404, body
    assert engine.loaded == engine.evicted == []
    assert engine.kept == {}


async def test_requests_at_a_time(engine: FakeEngine) -> None:
    """One more than the key may have is refused; a client that leaves makes room for the next."""
    dave = Key(name="dave", key="sk-dave-01234567890", max_requests=1)
    runner = await start_http(engine, HttpSettings(port=0), keyring=Keyring([dave]))
    try:
        async with client(f"http://127.0.0.1:{runner.addresses[0][1]}", dave.key) as caller:
            engine.pause()
            first = asyncio.create_task(caller.completions.create(model="m", prompt="x", max_tokens=3))
            await engine.arrived.wait()
            with pytest.raises(openai.RateLimitError):
                await caller.completions.create(model="m", prompt="x", max_tokens=3)
            first.cancel()
            await engine.idle.wait()
            engine.resume()
            await caller.completions.create(model="m", prompt="x", max_tokens=3)
    finally:
        await runner.cleanup()


async def test_limits_are_told_in_headers_and_refusals(guarded: str) -> None:
    """What is left on every answer; too many requests get 429 with the time to wait."""
    async with client(guarded, "sk-carol-0123456789") as carol:
        raw = await carol.completions.with_raw_response.create(model="m", prompt="x", max_tokens=5)
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == "2"
        await carol.completions.create(model="m", prompt="x", max_tokens=5)
        await carol.completions.create(model="m", prompt="x", max_tokens=5)
        with pytest.raises(openai.RateLimitError) as caught:
            await carol.completions.create(model="m", prompt="x", max_tokens=5)
    headers = caught.value.response.headers
    assert 1 <= int(headers["Retry-After"]) <= 20
    assert headers["x-should-retry"] == "true"
    assert caught.value.code == "rate_limit_exceeded"
    headers = {"Authorization": "Bearer sk-carol-0123456789"}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{guarded}/metrics") as page:
        lines = (await page.text()).splitlines()
    assert 'seallmd_key_requests_total{key="carol"} 3.0' in lines
    assert 'seallmd_key_limited_total{key="carol"} 1.0' in lines


async def test_a_chat_may_leave_its_limit_out(guarded: str) -> None:
    """Where the model's context (200) is longer than a minute's tokens (100)."""
    async with client(guarded, "sk-carol-0123456789") as carol:
        answer = await carol.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}]
        )
    assert answer.choices[0].finish_reason == "stop"


async def test_a_prompt_without_an_output_is_counted(guarded: str) -> None:
    """`max_tokens` 0 with `echo`: the prompt is run like any other."""
    async with client(guarded, "sk-carol-0123456789") as carol:
        await carol.completions.create(model="m", prompt=[5] * 90, max_tokens=0, echo=True)
        with pytest.raises(openai.RateLimitError):
            await carol.completions.create(model="m", prompt=[5] * 90, max_tokens=0, echo=True)


async def test_a_reload_changes_keys_at_once(engine: FakeEngine) -> None:
    """For the next request; the server is the same."""
    ring = Keyring([ALICE])
    runner = await start_http(engine, HttpSettings(port=0), keyring=ring)
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with client(url, "sk-alice-0123456789") as alice:
        await alice.models.list()
        ring.replace([CAROL])
        with pytest.raises(openai.AuthenticationError):
            await alice.models.list()
    await runner.cleanup()


async def test_pages_of_configured_origins_may_call(engine: FakeEngine) -> None:
    """Preflights need no key, answers carry the origin; other origins get nothing."""
    settings = HttpSettings(port=0, cors_origins=("https://chat.example",))
    runner: web.AppRunner = await start_http(engine, settings, keyring=Keyring([ALICE]))
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/models"
    good, bad = {"Origin": "https://chat.example"}, {"Origin": "https://evil.example"}
    sent = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # as OpenAI's client does
    asks = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": sent}
    async with aiohttp.ClientSession() as session:
        async with session.options(url, headers=good | asks) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert "DELETE" in response.headers["Access-Control-Allow-Methods"], "of files"
            assert response.headers["Access-Control-Allow-Headers"] == sent
        async with session.options(url, headers=bad | asks) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
        async with session.get(url, headers=good) as response:
            assert response.status == 401
            assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    await runner.cleanup()


async def test_no_cors_by_default(url: str) -> None:
    """Not even for pages of this machine: they get answers, but no browser shows them."""
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    async with aiohttp.ClientSession() as session, session.options(f"{url}/v1/models", headers=headers) as r:
        assert r.status == 405
        assert "Access-Control-Allow-Origin" not in r.headers

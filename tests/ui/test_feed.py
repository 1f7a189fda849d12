"""What the page is made from: its files, its feed, and who may press its buttons. Needs no browser."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from seallmd.api.keys import Key, Keyring
from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from seallmd.api.ui import VERBS
from seallmd.core.events import PinWanted
from tests.api.engine_double import FakeEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")

OURS = {"X-Seallmd-Page": "1"}
ASSETS = sorted(f.name for f in files("seallmd.ui").iterdir() if not f.name.startswith("__"))


async def first_frame(
    session: aiohttp.ClientSession, url: str, query: str = "", **headers: str
) -> dict[str, Any]:
    async with session.get(f"{url}/ui/feed{query}", headers=headers) as response:
        assert response.status == 200
        line = await response.content.readline()
        return dict(msgspec.json.decode(line.removeprefix(b"data: ")))


async def post(url: str, path: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.post(url + path, headers=headers) as response:
        return response.status


@pytest.mark.parametrize("name", ASSETS)
async def test_files(url: str, name: str) -> None:
    """Every file is served with a policy that lets nothing in from elsewhere, and is kept by browsers."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/ui/{name}") as response:
            assert response.status == 200
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            tag = response.headers["ETag"]
        async with session.get(f"{url}/ui/{name}", headers={"If-None-Match": tag}) as response:
            assert (response.status, await response.read()) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2f__init__.py", "%2e%2e/server.py"])
async def test_no_other_files(url: str, name: str) -> None:
    """What is not part of the page cannot be read through it."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/ui/{name}") as response:
        assert response.status == 404


async def test_frame(engine: FakeEngine, url: str) -> None:
    """The first frame has all of now, and the past."""
    async with aiohttp.ClientSession() as session:
        frame = await first_frame(session, url)
    assert [card["status"]["name"] for card in frame["services"]] == list(engine.views)
    (device,) = frame["devices"]
    runs = [["weights", "m", 60], ["free", "", 130], ["promised", "m", 6], ["kv", "m", 60]]
    assert (device["cells"], device["cell_count"]) == (runs, 256)
    assert frame["samples"][0]["services"]["m"] == ["resident", 0, 0, 0.0]
    assert (frame["verbs"], frame["denied"]) == (list(VERBS), "")


async def test_resuming(url: str) -> None:
    """A page that comes back gets what it lacks; one of an earlier daemon gets everything."""
    async with aiohttp.ClientSession() as session:
        frame = await first_frame(session, url)
        last = frame["samples"][-1]["number"]
        again = await first_frame(session, url, f"?boot={frame['boot']}&sample={last}")
        assert all(sample["number"] > last for sample in again["samples"])
        other = await first_frame(session, url, f"?boot=another&sample={last}")
        assert other["samples"][0]["number"] == 1


async def test_open_feeds_do_not_hold_up_the_end(engine: FakeEngine) -> None:
    """A page that is open does not make stopping wait."""
    runner = await start_http(engine, HttpSettings(port=0))
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/ui/feed"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert await response.content.readline()
        await asyncio.wait_for(runner.cleanup(), timeout=5)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OURS, 200),
        ({}, 403),  # a form, or a script that may not set headers
        ({**OURS, "Origin": "http://localhost:1"}, 403),  # another page of this machine
        ({**OURS, "Sec-Fetch-Site": "same-site"}, 403),
        ({**OURS, "X-Forwarded-For": "203.0.113.9"}, 403),  # a proxy stands between
    ],
)
async def test_who_may_operate(engine: FakeEngine, url: str, headers: dict[str, str], status: int) -> None:
    """Only our own page on this machine changes anything."""
    assert await post(url, "/ui/services/m/evict", **headers) == status
    assert engine.evicted == (["m"] if status == 200 else [])


async def test_other_names_of_an_open_server(engine: FakeEngine) -> None:
    """Configured to be reached from elsewhere, any name passes the guard; one that was pointed here by a page
    (DNS rebinding) still changes nothing."""
    runner = await start_http(engine, HttpSettings(host="0.0.0.0", port=0))
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        evil = {**OURS, "Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
        assert await post(url, "/ui/services/m/evict", **evil) == 403
        assert await post(url, "/ui/services/m/evict", **OURS, Host="localhost:1") == 200
    finally:
        await runner.cleanup()


async def test_unix_socket(engine: FakeEngine, tmp_path: Path) -> None:
    """Whoever comes that way is a proxy, and may serve anybody."""
    path = str(tmp_path / "http.sock")
    runner = await start_http(engine, HttpSettings(host="", socket=path))
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
            session.post("http://localhost/ui/services/m/evict", headers=OURS) as response,
        ):
            assert response.status == 403
    finally:
        await runner.cleanup()


async def test_admin_keys(engine: FakeEngine) -> None:
    """Once there are keys, one with admin operates from wherever it is, and nobody else does."""
    keys = [Key(name="root", key="a" * 20, admin=True), Key(name="user", key="b" * 20)]
    runner = await start_http(engine, HttpSettings(port=0), keyring=Keyring(keys))
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        assert await post(url, "/ui/services/m/pin", **OURS) == 401
        assert await post(url, "/ui/services/m/pin", **OURS, Authorization=f"Bearer {keys[1].key}") == 403
        admin = {"Authorization": f"Bearer {keys[0].key}", "X-Forwarded-For": "203.0.113.9"}
        assert await post(url, "/ui/services/m/pin", **admin) == 403  # not from the page
        assert await post(url, "/ui/services/m/pin", **OURS, **admin) == 200
        assert engine.operated == [PinWanted(0, "m")]
        async with aiohttp.ClientSession() as session:
            assert "drain" in (await first_frame(session, url, **admin))["verbs"]
    finally:
        await runner.cleanup()


async def test_from_elsewhere(url: str) -> None:
    """Behind a proxy the page shows everything, offers no buttons, and says why."""
    async with aiohttp.ClientSession() as session:
        frame = await first_frame(session, url, Forwarded="for=203.0.113.9")
    assert frame["verbs"] == []
    assert "proxy" in frame["denied"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("m/load", 200),
        ("held/load", 200),
        ("held/evict", 403),  # pinned
        ("gone/load", 409),  # cannot be
        ("nobody/load", 404),
        ("m/explode", 404),
    ],
)
async def test_operating(url: str, path: str, status: int) -> None:
    """What can be done is done; what cannot is told as what it is."""
    assert await post(url, f"/ui/services/{path}", **OURS) == status


async def test_reading_takes_no_verb(url: str) -> None:
    """A link or an image cannot change anything."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/ui/services/m/evict") as response:
        assert response.status == 405

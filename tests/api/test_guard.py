"""DNS rebinding: web pages of others cannot use a server that listens on this machine alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from seallmd.api.guard import is_loopback
from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from tests.api.engine_double import FakeEngine


async def status_of(url: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/api/tags"])
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
async def test_host(url: str, path: str, host: str, status: int) -> None:
    """A page's own name that resolves to 127.0.0.1 is not ours, on any route."""
    assert await status_of(url + path, Host=host) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
async def test_origin(url: str, origin: str, status: int) -> None:
    """A page elsewhere may post without reading the answer; its Origin tells."""
    assert await status_of(url + "/v1/models", Origin=origin) == status


async def test_no_cors(url: str) -> None:
    """No page may read answers: no header says that it may, and preflights fail."""
    async with aiohttp.ClientSession() as session:
        headers = {"Origin": "http://localhost:3000"}
        async with session.get(url + "/v1/models", headers=headers) as response:
            assert not [name for name in response.headers if name.lower().startswith("access-control")]
        async with session.options(url + "/v1/chat/completions", headers=headers) as response:
            assert response.status == 405


async def test_unix_socket_has_no_names(runner: web.AppRunner, tmp_path: Path) -> None:  # noqa: ARG001
    """No browser reaches it, and clients call the host whatever they like."""
    connector = aiohttp.UnixConnector(str(tmp_path / "http.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://seallmd/v1/models") as response,
    ):
        assert response.status == 200


async def test_open_server(engine: FakeEngine) -> None:
    """Configured to be reached from elsewhere, it has names that it cannot know."""
    runner = await start_http(engine, HttpSettings(host="0.0.0.0", port=0))
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/models"
        assert await status_of(url, Host="gpu-box.example", Origin="https://ui.example") == 200
    finally:
        await runner.cleanup()


async def test_missing_host(port: int) -> None:
    """HTTP/1.0 has none: it is not ours either."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert b" 403 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("box.example", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    """Which listeners are guarded."""
    assert is_loopback(host) == loopback

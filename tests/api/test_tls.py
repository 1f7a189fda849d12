"""TLS: with a certificate and its key TCP speaks nothing else; half of it is a wrong configuration."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from seallmd.api.server import http_addresses, start_http, tls_context
from seallmd.api.settings import HttpSettings
from seallmd.ctl import http
from seallmd.errors import ConfigError
from tests.api.engine_double import FakeEngine


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for localhost, signed by itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-days", "2", "-out", certificate, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


async def test_tls(engine: FakeEngine, pair: tuple[str, str], tmp_path: Path) -> None:
    """Verified by a client that knows the certificate; the Unix socket stays plain."""
    socket = str(tmp_path / "http.sock")
    settings = HttpSettings(port=0, socket=socket, tls_certificate=pair[0], tls_key=pair[1])
    runner = await start_http(engine, settings)
    secure, unix = http_addresses(runner, tls=True)
    assert secure.startswith("https://")
    trust = ssl.create_default_context(cafile=pair[0])
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{secure}/health", ssl=trust) as response:
            assert response.status == 200
        # seallmctl on the same machine needs no certificate of its own.
        assert (await asyncio.to_thread(http.get, secure, "/health"))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await session.get(secure.replace("https", "http") + "/health")
    plain = aiohttp.UnixConnector(unix.removeprefix("unix:"))
    async with (
        aiohttp.ClientSession(connector=plain) as session,
        session.get("http://localhost/health") as response,
    ):
        assert response.status == 200
    await runner.cleanup()


def test_half_of_it_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    """And so is what is no certificate, by name."""
    assert tls_context(HttpSettings()) is None
    with pytest.raises(ConfigError, match="needs both"):
        tls_context(HttpSettings(tls_certificate=pair[0]))
    with pytest.raises(ConfigError, match=r"none\.pem"):
        tls_context(HttpSettings(tls_certificate=str(tmp_path / "none.pem"), tls_key=pair[1]))
    with pytest.raises(ConfigError, match="http:"):
        tls_context(HttpSettings(tls_certificate=pair[1], tls_key=pair[0]))

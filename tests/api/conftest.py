"""A served stand-in: a fake engine behind the real HTTP server, and the real OpenAI client before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from tests.api.engine_double import SPOKEN, FakeEngine, view, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory."""
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture
async def engine(model: Path, tokenizer: Tokenizer) -> AsyncIterator[FakeEngine]:
    """Serves "m"; "gone" was refused, "young" is not examined yet. Every answer is SPOKEN and </s>."""
    answer = [*tokenizer.encode(SPOKEN, add_special_tokens=False).ids, 1]
    views = [view("m", model), view("gone", model, reason="no such architecture"), view("young", None)]
    engine = FakeEngine(views, answer)
    yield engine
    await engine.close()


@pytest.fixture
async def runner(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[web.AppRunner]:
    """The server, on a free TCP port and on tmp_path/http.sock."""
    settings = HttpSettings(port=0, socket=str(tmp_path / "http.sock"), max_body_bytes=1 << 16)
    runner = await start_http(engine, settings)
    yield runner
    await runner.cleanup()


@pytest.fixture
def port(runner: web.AppRunner) -> int:
    return next(address[1] for address in runner.addresses if isinstance(address, tuple))


@pytest.fixture
def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client

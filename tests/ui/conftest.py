"""A served stand-in with something to look at, and a headless Chromium before it.

The browser is the one of the system (playwright's own are not fetched); without one, its tests are skipped.
Everything runs in the session's loop: that is the browser's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Page, async_playwright
from tokenizers import Tokenizer

from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from seallmd.core.status import ArenaMap, Cell, Holding
from tests.api.engine_double import SPOKEN, FakeEngine, view, write_model

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
WEIGHTS, KV, PROMISED, FREE = (
    *(Cell("weights", "m"), Cell("kv", "m")),
    *(Cell("promised", "m"), Cell("free", "")),
)
MAP = ArenaMap(
    0, 256, (WEIGHTS,) * 60 + (FREE,) * 130 + (PROMISED,) * 6 + (KV,) * 60, (Holding("m", 60, 60, 6),)
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


@pytest_asyncio.fixture(loop_scope="session")
async def engine(model: Path) -> AsyncIterator[FakeEngine]:
    """Serves "m"; "gone" was refused, "held" is pinned, "away" is absent."""
    answer = [*tokens(model, SPOKEN), 1]
    views = [view("m", model, context=4000), view("gone", model, reason="no such architecture")]
    views += [view("held", model, pinned=True), view("away", model)]
    engine = FakeEngine(views, answer)
    engine.maps = [MAP]
    engine.states["away"] = {"state": "absent", "devices": ()}
    engine.states["m"] = {"groups": ((0,),)}
    yield engine
    await engine.close()


def tokens(model: Path, text: str) -> list[int]:
    """A text as the models of these tests have it."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest_asyncio.fixture(loop_scope="session")
async def runner(engine: FakeEngine) -> AsyncIterator[web.AppRunner]:
    runner = await start_http(engine, HttpSettings(port=0))
    yield runner
    await runner.cleanup()


@pytest.fixture
def url(runner: web.AppRunner) -> str:
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser, url: str) -> AsyncIterator[Page]:
    """The page, opened and filled. Whatever it complains of in the console fails the test."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    await page.goto(f"{url}/ui")
    await page.wait_for_selector("#service-list tr")
    yield page
    await context.close()
    # A test that breaks the policy on purpose is told so.
    assert not [text for text in complaints if "TrustedHTML" not in text], complaints

"""The page in a browser: what it shows, what its buttons do, and that no text becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from seallmd.core.events import Finish, PinWanted, ServiceDrainWanted
from tests.api.engine_double import SPOKEN, TEMPLATE, FakeEngine, view, write_model
from tests.ui.conftest import tokens

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


async def ask(page: Page, text: str) -> None:
    await page.fill("#chat-text", text)
    await page.press("#chat-text", "Enter")


async def run(page: Page, function: str, argument: object = None) -> Any:
    """The result of a function in the page. By DevTools: the policy bars `eval`, playwright's too."""
    session = await page.context.new_cdp_session(page)
    call = {"expression": f"({function})({json.dumps(argument)})", "returnByValue": True}
    answer = await session.send("Runtime.evaluate", call)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


COLOURS = """selector => {
    const canvas = document.querySelector(selector);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
}"""


async def test_shows_what_there_is(page: Page) -> None:
    """Services with their states, the device and what it holds, in words as well as in colours."""
    await expect(page.locator("#health")).to_have_text("up · 2 of 4 resident")
    rows = page.locator("#service-list tr")
    await expect(rows).to_have_count(4)
    await expect(rows.nth(0)).to_contain_text("resident")
    await expect(rows.nth(1)).to_contain_text("no such architecture")
    await expect(rows.nth(3)).to_contain_text("away")
    map_ = page.locator(".device canvas")
    await expect(map_).to_have_attribute("aria-label", re.compile(r"m: weights 240 KiB, KV 240 KiB; free"))
    assert await run(page, COLOURS, ".device canvas") > 2
    await expect(page.locator("#lanes")).to_have_attribute("aria-label", re.compile(r"away is absent"))


async def test_pointing_at_a_cell(page: Page) -> None:
    """The map tells what lies where."""
    await page.locator(".device canvas").hover(position={"x": 3, "y": 3})
    await expect(page.locator("#tip")).to_have_text("m: weights (block 0)")


async def test_buttons(page: Page, engine: FakeEngine) -> None:
    """Load and evict reach the engine; there is no button for what makes no sense or is not allowed."""
    await page.get_by_role("button", name="Evict m", exact=True).click()
    await page.get_by_role("button", name="Load away").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#notice")).to_be_hidden()
    await expect(page.get_by_role("button", name="Load away")).to_be_enabled()
    assert (engine.evicted, engine.loaded) == (["m"], ["away"])
    await expect(page.get_by_role("button", name="Evict held")).to_have_count(0)
    await expect(page.get_by_role("button", name=re.compile("gone"))).to_have_count(0)
    await expect(page.get_by_role("button", name="Undrain m")).to_have_count(0)
    for button in ("Pin m", "Unpin held", "Drain m"):
        await page.get_by_role("button", name=button, exact=True).click()
        await expect(page.get_by_role("button", name=button, exact=True)).to_be_enabled()
    await expect(page.locator("#notice")).to_be_hidden()
    assert engine.operated == [
        PinWanted(0, "m"),
        PinWanted(0, "held", pinned=False),
        ServiceDrainWanted(0, "m"),
    ]


async def test_follows_changes(page: Page, engine: FakeEngine) -> None:
    """The page follows the feed: a load that failed appears in the table and among the events."""
    engine.states["away"] = {"state": "absent", "devices": (), "reason": HOSTILE}
    await expect(page.locator("#events li.failure")).to_contain_text(HOSTILE)
    await expect(page.locator("#service-list")).to_contain_text(HOSTILE)
    assert await page.title() == "seallmd"


async def test_chat(page: Page, engine: FakeEngine) -> None:
    """A question, its streamed answer, and how fast it was; the next question carries both."""
    await ask(page, "hello")
    answer = page.locator(".message.assistant")
    await expect(answer).to_contain_text(SPOKEN)
    await expect(answer).to_contain_text("first after")
    await ask(page, "again")
    await expect(answer).to_have_count(2)
    await expect(answer.nth(1)).to_contain_text("first after")
    assert len(engine.submitted[1].prompt) > 2 * len(engine.submitted[0].prompt)


async def test_thoughts(page: Page, engine: FakeEngine, tmp_path: Path) -> None:
    """What a model thinks is shown beside its answer, and is no part of the conversation."""
    write_model(tmp_path, TEMPLATE + "{# <think> #}")
    engine.views["m"] = view("m", tmp_path, context=4000)
    engine.answer = [*tokens(tmp_path, f"<think>Hm.</think>{SPOKEN}"), 1]
    await ask(page, "hello")
    answer = page.locator(".message.assistant")
    await expect(answer.locator(".thoughts")).to_have_text("Hm.")
    await expect(answer.locator("span").nth(1)).to_have_text(SPOKEN)
    await expect(answer).to_contain_text("first after")


async def test_hostile_answer(page: Page, engine: FakeEngine, model: Path) -> None:
    """Markup in an answer, or in what was asked, is shown as it was written and does nothing."""
    engine.answer = [*tokens(model, HOSTILE), 1]
    await ask(page, HOSTILE)
    await expect(page.locator(".message.assistant")).to_contain_text(HOSTILE)
    await expect(page.locator(".message.user")).to_have_text(HOSTILE)
    assert await page.locator(".log img, .log script").count() == 0
    assert await page.title() == "seallmd"


async def test_scripts_of_others_are_barred(page: Page) -> None:
    """Were markup to get in after all, the policy would not let it run."""
    script = "html => { try { document.body.innerHTML = html; return 'set'; } catch (e) { return e.name; } }"
    assert await run(page, script, HOSTILE) == "TypeError"


async def test_failed_answer(page: Page, engine: FakeEngine) -> None:
    """An error in mid-stream is told, beside what came."""
    engine.failing, engine.fail_after = Finish(0, "failed", "the worker died", status=500), 3
    await ask(page, "hello")
    await expect(page.locator(".message.error")).to_have_text("the worker died")


async def test_stop(page: Page, engine: FakeEngine) -> None:
    """The button that sent ends what it has begun; the engine hears of it."""
    engine.pause()
    await ask(page, "hello")
    await engine.arrived.wait()
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator(".message.assistant")).to_contain_text("stopped")
    await engine.idle.wait()
    assert engine.cancelled == [1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 600, 820, 1280])
async def test_fits(page: Page, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, from phones to desks, and text keeps its contrast in both schemes."""
    await page.set_viewport_size({"width": width, "height": 800})
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    assert await run(page, "() => document.documentElement.scrollWidth") <= width
    for pair in (
        ("text", "ground"),
        ("text", "card"),
        ("quiet", "card"),
        ("quiet", "ground"),
        ("bad", "card"),
    ):
        assert await run(page, CONTRAST, pair) >= 4.5, pair


# WCAG 2.1's contrast ratio of two colours of the style sheet.
CONTRAST = """names => {
    const style = getComputedStyle(document.documentElement);
    const [a, b] = names.map(name => {
        const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
        const part = at => parseInt(hex.slice(at, at + 2), 16) / 255;
        const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
        return 0.2126 * linear(part(0)) + 0.7152 * linear(part(2)) + 0.0722 * linear(part(4));
    });
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


async def test_keyboard(page: Page) -> None:
    """The first Tab leads past the bar, and what has the focus shows it."""
    await page.keyboard.press("Tab")
    await expect(page.locator(".skip")).to_be_focused()
    assert await run(page, NAMELESS) == []


# Controls and pictures that a screen reader could not name.
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, canvas[role]")]
    .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"""

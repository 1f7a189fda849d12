"""`service_tier`: the tier that serves is what was asked for, as far as the key goes."""

from __future__ import annotations

import pytest
from openai import AsyncOpenAI, PermissionDeniedError

from seallmd.api.keys import Key, Keyring
from seallmd.api.server import start_http
from seallmd.api.settings import HttpSettings
from tests.api.engine_double import FakeEngine

KEYS = {
    name: Key(name=name, key=f"sk-{name}-0123456789", tier=name) for name in ("priority", "default", "flex")
}


@pytest.mark.parametrize(
    ("asked", "served"), [("auto", "default"), ("flex", "flex"), ("priority", "priority")]
)
async def test_without_keys_all_tiers_can_be_had(
    client: AsyncOpenAI, engine: FakeEngine, asked: str, served: str
) -> None:
    """Protects the way from the field to the engine, and what the answer says, on all three endpoints."""
    more = {"service_tier": asked}
    message = {"role": "user", "content": "x"}
    chat = await client.chat.completions.create(model="m", messages=[message], extra_body=more)  # type: ignore[list-item]
    text = await client.completions.create(model="m", prompt="x", extra_body=more)
    response = await client.responses.create(model="m", input="x", extra_body=more)
    assert [g.tier for g in engine.submitted] == [served] * 3
    assert chat.service_tier == response.service_tier == served
    assert text.model_extra is not None
    assert text.model_extra["service_tier"] == served


@pytest.mark.parametrize(
    ("key", "asked", "served"),
    [
        *(("priority", "auto", "priority"), ("priority", "flex", "flex"), ("priority", "default", "default")),
        *(("default", "priority", ""), ("default", "flex", "flex"), ("flex", "default", "")),
        *(("flex", "auto", "flex"), ("flex", None, "flex")),
    ],
)
async def test_a_key_s_tier_is_the_best_that_it_may_have(
    engine: FakeEngine, key: str, asked: str | None, served: str
) -> None:
    """Protects the tiers that an operator gave: below is free, above is refused."""
    runner = await start_http(engine, HttpSettings(port=0), keyring=Keyring(list(KEYS.values())))
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key=KEYS[key].key, max_retries=0) as client:
        asking = client.completions.create(model="m", prompt="x", extra_body={"service_tier": asked})
        if served:
            await asking
            assert [g.tier for g in engine.submitted] == [served]
        else:
            with pytest.raises(PermissionDeniedError) as caught:
                await asking
            assert (caught.value.code, caught.value.param) == ("tier_not_allowed", "service_tier")
            assert not engine.submitted
    await runner.cleanup()

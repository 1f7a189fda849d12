"""/openapi.json: valid, complete, and true to the types."""

from __future__ import annotations

import aiohttp
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from seallmd.api.keys import Key, Keyring
from seallmd.api.openapi import OPERATIONS, document
from seallmd.api.schema import ChatRequest
from seallmd.api.server import build_app, start_http
from seallmd.api.settings import HttpSettings
from tests.api.engine_double import FakeEngine


async def test_the_served_document_is_valid(url: str) -> None:
    """By somebody else's judgement."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/openapi.json") as response:
        served = await response.json()
    assert served == document()
    validate(served, cls=OpenAPIV31SpecValidator)


def test_every_route_is_described(engine: FakeEngine) -> None:
    """And nothing else; the page's own routes are no interface for programs."""
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in build_app(engine, HttpSettings()).router.routes()
        if route.resource is not None and route.method != "HEAD"
        if not route.resource.canonical.startswith("/ui")
    }
    assert routes == {(operation.method, operation.path) for operation in OPERATIONS}


def test_fields_come_from_the_types() -> None:
    """With their bounds: what is refused is told beforehand."""
    found = document()["components"]["schemas"]["ChatRequest"]
    assert found["properties"].keys() == set(ChatRequest.__struct_fields__)
    assert found["required"] == ["model", "messages"]
    (temperature,) = [kind for kind in found["properties"]["temperature"]["anyOf"] if "maximum" in kind]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)


def test_events_are_documents_in_strings() -> None:
    """What is described is the event, whose data is the chunk."""
    answers = document()["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    data, end = answers["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    assert (data["type"], data["contentMediaType"]) == ("string", "application/json")
    assert data["contentSchema"] == {"$ref": "#/components/schemas/ChatChunk"}


async def test_keys_are_told(engine: FakeEngine) -> None:
    """What needs one, and what does not."""
    key = Key(name="alice", key="sk-alice-0123456789")
    runner = await start_http(engine, HttpSettings(port=0), keyring=Keyring([key]))
    headers = {"Authorization": f"Bearer {key.key}"}
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/openapi.json"
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
        served = await response.json()
    validate(served, cls=OpenAPIV31SpecValidator)
    assert served["security"] == [{"key": []}]
    assert served["paths"]["/health"]["get"]["security"] == []
    assert "security" not in served["paths"]["/v1/models"]["get"]
    await runner.cleanup()

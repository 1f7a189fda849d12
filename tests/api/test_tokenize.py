"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer

from tests.api.engine_double import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]


async def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


async def test_there_and_back(url: str, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    """What /tokenize gives is what a completion would run; /detokenize gives the text again."""
    status, answer = await post(url + "/tokenize", {"model": "m", "prompt": "hello 日本"})
    tokens = tokenizer.encode("hello 日本").ids
    assert status == 200
    assert answer == {"count": len(tokens), "max_model_len": 200, "tokens": tokens, "token_strs": None}
    assert await post(url + "/detokenize", {"model": "m", "tokens": tokens}) == (
        200,
        {"prompt": "<s>hello 日本"},
    )
    assert engine.submitted == []


async def test_options(url: str) -> None:
    """Special tokens can be left out; strings come on demand."""
    body = {"model": "m", "prompt": "hello", "add_special_tokens": False, "return_token_strs": True}
    _, answer = await post(url + "/tokenize", body)
    assert 0 not in answer["tokens"]
    assert "".join(answer["token_strs"]) == "hello"


async def test_conversation(url: str, tokenizer: Tokenizer) -> None:
    """Messages go through the template, once with and once without the assistant's turn."""
    for fields, end in (({}, "<assistant>"), ({"add_generation_prompt": False}, "")):
        _, answer = await post(url + "/tokenize", {"model": "m", "messages": HELLO, **fields})
        text = tokenizer.decode(answer["tokens"], skip_special_tokens=False)
        assert text == f"<s><user>hello\n{end}"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": "m"}, 400, "prompt"),
        ("/tokenize", {"model": "m", "prompt": "x", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "x"}, 400, "model"),
        ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/detokenize", {"model": "m", "tokens": [320]}, 400, "tokens"),
        ("/detokenize", {"model": "m", "tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"model": "m", "tokens": "x"}, 400, "tokens"),
    ],
)
async def test_refusals(url: str, path: str, body: dict[str, Any], status: int, param: str) -> None:
    """As everywhere: OpenAI's shape, and the field by name."""
    got, answer = await post(url + path, body)
    assert (got, answer["error"]["param"]) == (status, param)

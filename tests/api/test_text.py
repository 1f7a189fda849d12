"""Work with text beside the event loop: a long text of one client must not stop the others' streams."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seallmd.api.text import TextModel, TextModels, Tokenizers

LONG = "the quick brown fox jumps over the lazy dog " * 8000


class Watched:
    """A tokenizer that notes how often the event loop turned during each of its calls."""

    def __init__(self, tokenizer: Any, turns: Callable[[], int]) -> None:
        self._tokenizer, self._turns = tokenizer, turns
        self.seen: list[int] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tokenizer, name)

        def call(*given: Any, **options: Any) -> Any:
            before = self._turns()
            try:
                return method(*given, **options)
            finally:
                self.seen.append(self._turns() - before)

        return call


@pytest.fixture
async def texts() -> AsyncIterator[TextModels]:
    texts = TextModels()
    yield texts
    await texts.close()


@pytest.fixture
def patience() -> Iterator[None]:
    """Threads hand the interpreter over of their own accord alone."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("patience")
async def test_the_loop_turns_while_a_text_is_encoded(texts: TextModels, model: Path) -> None:
    """`tokenizers` keeps the interpreter's lock in some of its methods: then a thread is of no use."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    text_model = TextModel.read(model, Tokenizers())
    watched = text_model.tokenizer = Watched(text_model.tokenizer, lambda: turns)  # type: ignore[assignment]
    turning = asyncio.create_task(turn())
    tokens = await texts.encode(text_model, LONG, add_special_tokens=False)
    assert await texts.decode(text_model, tokens) == LONG
    turning.cancel()
    assert len(watched.seen) == 2
    assert all(watched.seen), watched.seen


async def test_the_same_tokens_as_one_by_one(texts: TextModels, model: Path) -> None:
    """With the special tokens that lead a prompt, and without."""
    text_model = TextModel.read(model, Tokenizers())
    for special in (True, False):
        tokens = await texts.encode(text_model, "Hello wörld 日本", add_special_tokens=special)
        assert tokens == text_model.tokenizer.encode("Hello wörld 日本", add_special_tokens=special).ids


async def test_short_texts_pass_long_ones(texts: TextModels, model: Path) -> None:
    """A few megabytes of text take seconds each: a chat must not wait for them."""
    text_model, done = TextModel.read(model, Tokenizers()), threading.Event()
    encode = text_model.tokenizer.encode_batch_fast

    class Blocked:
        def encode_batch_fast(self, given: list[str], **options: bool) -> Any:
            if len(given[0]) > 9:
                done.wait()
            return encode(given, **options)

    text_model.tokenizer = Blocked()  # type: ignore[assignment]
    longs = [asyncio.create_task(texts.encode(text_model, LONG, add_special_tokens=False)) for _ in range(3)]
    await asyncio.sleep(0)
    try:
        assert await texts.encode(text_model, "hello", add_special_tokens=False)
    finally:
        done.set()
    assert len(await asyncio.gather(*longs)) == 3


def test_models_of_a_family_share_a_tokenizer(model: Path, tmp_path: Path) -> None:
    """It is read once for all that have the same, and again for one that is another."""
    tokenizers, other, changed = Tokenizers(), tmp_path / "other", tmp_path / "changed"
    for directory in (other, changed):
        shutil.copytree(model, directory)
    file = changed / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    first = TextModel.read(model, tokenizers).tokenizer
    assert TextModel.read(other, tokenizers).tokenizer is first
    assert TextModel.read(changed, tokenizers).tokenizer is not first

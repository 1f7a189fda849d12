"""Text of the served models: tokenizers and chat templates, loaded when first needed.

Owns reading them and all work with text that is too slow for the event loop. Must not know HTTP. Only
`tokenizers` is used: transformers would bring torch into the daemon.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from seallmd.api.conversation import explain_tools
from seallmd.api.detokenize import Detokenizer, special_ids
from seallmd.api.templates import RENDER_SECONDS, ChatTemplate, TemplateRenderer, read_chat_template
from seallmd.api.vocabulary import Vocabulary
from seallmd.errors import RequestError

_log = logging.getLogger(__name__)
_THREADS = 2
_LONG = 1 << 16  # characters or tokens: some 50 ms of work
_SPACES = 8  # tokens of white space at an end, at most
# Behind the content of a message that is to be continued, to find its end in the rendered text: as in
# transformers (`apply_chat_template`), with the space that tells whether the template trims.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "

Result = TypeVar("Result")


class Echo(msgspec.Struct, frozen=True):
    """A prompt as the beginning of an answer's text. offsets: where in it each of its tokens begins."""

    text: str
    offsets: list[int]


class Tokenizers:
    """The tokenizers of all models, one for each content.

    Models of a family have the same. One of a large vocabulary takes 140 MiB, and a second to read, in which
    `tokenizers` keeps the interpreter's lock: every stream stands still.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Tokenizer] = {}
        self._lock = Lock()  # who comes second finds what the first has read

    def read(self, file: Path) -> Tokenizer:
        """The tokenizer that a file holds. Raises what `tokenizers` and the file system do."""
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        with self._lock:
            if digest not in self._known:
                self._known[digest] = tokenizer = Tokenizer.from_buffer(content)
                # Some checkpoints were saved with the limits of their training script.
                tokenizer.no_truncation()
                tokenizer.no_padding()
            return self._known[digest]


class TextModel:
    """The text side of one model: a tokenizer and, for chat models, a template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.vocabulary = Vocabulary(tokenizer)
        self._special = special_ids(tokenizer)
        self._added = frozenset(tokenizer.get_added_tokens_decoder())

    @classmethod
    def read(cls, directory: Path, tokenizers: Tokenizers) -> TextModel:
        """Read a model's directory. Raises RequestError when the files are missing or broken."""
        try:
            tokenizer = tokenizers.read(directory / "tokenizer.json")
            template = read_chat_template(directory)
        except Exception as error:
            # `tokenizers` raises plain Exception; whatever it is, only this model cannot be used.
            _log.exception("the tokenizer in %s cannot be read", directory)
            message = "this model's tokenizer cannot be read"
            raise RequestError(message, status=503, code="model_unavailable") from error
        return cls(tokenizer, template)

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special: bool, keep: Sequence[str] = ()
    ) -> Detokenizer:
        """A detokenizer for what follows `prompt` (empty: the text starts afresh, as an assistant's turn).

        keep: special tokens that stay in the text in any case.
        """
        kept = {self.tokenizer.token_to_id(token) for token in keep}
        return Detokenizer(self.tokenizer, prompt, skip=self._special - kept if skip_special else frozenset())

    def ends_with(self, tokens: Sequence[int], text: str) -> bool:
        """Whether tokens end with a text, but for white space."""
        tail = list(tokens[-len(text) - _SPACES :])
        return str(self.tokenizer.decode(tail, skip_special_tokens=False)).rstrip().endswith(text)

    def added_id(self, text: str) -> int | None:
        """The id of a text that is one token whatever is around it; None when it is none.

        Grammars have to name such a token by its id: as text, it would have to be spelt in others.
        """
        found: int | None = self.tokenizer.token_to_id(text)
        return found if found in self._added else None


class TextModels:
    """All models' text sides, by directory, and the threads and the process that do the work."""

    def __init__(self, render_seconds: float = RENDER_SECONDS) -> None:
        """render_seconds: limit of rendering one chat template."""
        # `tokenizers` would start a thread for each core, which batches of one have no use for.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._models: dict[str, asyncio.Task[TextModel]] = {}
        self._tokenizers = Tokenizers()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")
        self._for_long = ThreadPoolExecutor(1, thread_name_prefix="long-text")  # short ones pass them
        self._renderer = TemplateRenderer(render_seconds)

    async def get(self, directory: str) -> TextModel:
        """A model's text side. Raises RequestError when it cannot be read; the next call tries again."""
        task = self._models.get(directory)
        if task is None:
            task = self._models[directory] = asyncio.create_task(self._read(directory))
        # Others may wait for the same files: who leaves must not stop the reading.
        return await asyncio.shield(task)

    async def encode(self, model: TextModel, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

        def work() -> list[int]:
            # As a batch of one: `encode` keeps the interpreter's lock, a second for each megabyte.
            (encoded,) = model.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded.ids)

        return await self._beside(work, len(text))

    async def decode(self, model: TextModel, tokens: list[int]) -> str:
        """The text of token ids, special tokens included."""

        def work() -> str:
            (text,) = model.tokenizer.decode_batch([tokens], skip_special_tokens=False)  # as in `encode`
            return str(text)

        return await self._beside(work, len(tokens))

    async def echo(
        self, model: TextModel, tokens: list[int], text: str | None, *, skip_special: bool
    ) -> Echo:
        """A prompt as it is echoed. text: as the client gave it, None where it gave ids."""

        def work() -> Echo:
            detokenizer = model.detokenizer((), skip_special=skip_special)
            offsets, parts, length = list[int](), list[str](), 0
            for token in tokens:
                offsets.append(length)
                parts.append(detokenizer.push(token))
                length += len(parts[-1])
            told = "".join(parts) + detokenizer.flush() if text is None else text
            return Echo(told, [min(offset, len(told)) for offset in offsets])

        return await self._beside(work, len(tokens))

    async def encode_chat(
        self,
        model: TextModel,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        continue_final: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's turn begins.

        messages: role and content (a string) each. tools: what the model may call. variables: further names
        for the template. add_generation_prompt: begin the assistant's turn. add_special_tokens: let the
        tokenizer add a BOS, which templates write themselves. continue_final: the last message is not over:
        the text ends where its content does. Raises RequestError without a template or when it refuses the
        messages.
        """
        template = model.template
        if template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        if tools and template.knows_tools:
            variables = {**variables, "tools": tools}
        elif not template.knows_tools:
            messages = explain_tools(messages, list(tools))
        if not template.knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if not template.takes_reasoning:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        if continue_final:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _MARK}]
            add_generation_prompt = False
        chat = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        text = await self._renderer.render(template, chat)
        if continue_final:
            text = _before_mark(text)
        return await self.encode(model, text, add_special_tokens=add_special_tokens)

    async def close(self) -> None:
        """End the threads and the template process."""
        for task in self._models.values():
            task.cancel()
        await self._renderer.close()
        for threads in (self._threads, self._for_long):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _beside(self, work: Callable[[], Result], size: int) -> Result:
        """Do some work beside the loop. size: of its text, in characters or tokens."""
        threads = self._for_long if size > _LONG else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def _read(self, directory: str) -> TextModel:
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._threads, TextModel.read, Path(directory), self._tokenizers
            )
        except BaseException:
            del self._models[directory]
            raise


def _before_mark(text: str) -> str:
    """The text up to where a message that is to be continued ends. Raises RequestError."""
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise RequestError("the chat template leaves out the last message", param="continue_final_message")
    return text[:at] if text[at:].startswith(_MARK) else text[:at].rstrip()

"""A stand-in for the engine, and the small models that it pretends to serve.

`FakeEngine` says the same text to every prompt, one token at a time, as fast as the loop turns. `pause()`
holds all tokens back: a request is then queued, or stops where it is.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from seallmd.core.events import Finish, OperatorEvent
from seallmd.core.messages import Pooled, Scores
from seallmd.core.settings import ServiceSettings
from seallmd.core.shapes import LayerShape, ModelShape
from seallmd.core.status import (
    ArenaMap,
    DeviceStatus,
    NodeStatus,
    RequestStatus,
    ServiceDetail,
    ServiceStatus,
)
from seallmd.errors import ControlError
from seallmd.runtime.face import Generation, ServiceView, TokenStream
from seallmd.runtime.feed import EventFeed

SPOKEN = "Hello wörld, 日本語 and 👩‍👩‍👧 at last."
CORPUS = ["hello world, the quick brown fox jumps over the lazy dog", "wörld ünïcode 日本"] * 3
TEMPLATE = (
    "{{ bos_token }}{{ hint }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; ids 0 and 1 are <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_model(directory: Path, template: str | None = TEMPLATE) -> Tokenizer:
    """The text files of a model, as they lie in a checkpoint's directory."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def view(
    name: str,
    directory: Path | None,
    *,
    vocab: int = 320,
    context: int = 200,
    reason: str = "",
    **settings: Any,
) -> ServiceView:
    """A service; without a directory it is not examined yet."""
    shape = ModelShape(
        "Fake", "float32", 4, (LayerShape(1, 8, 8),), (64,), vocab, context, eos=(1,), hidden=4
    )
    return ServiceView(
        settings=ServiceSettings(name=name, model="fake", **settings),
        created=1_700_000_000,
        directory=None if directory is None else str(directory),
        shape=None if directory is None else shape,
        reason=reason,
    )


def logprob_of(token: int) -> float:
    """What the engine tells of a token, wherever it is."""
    return -1.0 - token / 64


def scores(position: int, tokens: tuple[int, ...], top: int) -> Scores:
    """The likeliest are the ids 40, 41, ... with -0.25, -0.5, ...; exact in float32."""
    ids, values = [], []
    for token in tokens:
        ids += [token, *range(40, 40 + top)]
        values += [logprob_of(token), *(-0.25 * (i + 1) for i in range(top))]
    packed = struct.pack(f"<{len(ids)}i", *ids), struct.pack(f"<{len(values)}f", *values)
    return Scores(0, position, top, *packed, struct.pack(f"<{len(tokens)}i", *[7] * len(tokens)))


def hidden(token: int) -> list[float]:
    """The made-up hidden state of a token."""
    return [1.0, float(token), -float(token), 0.5]


class FakeEngine:
    """`EngineFace` without a model. `failing`: how requests end after `fail_after` tokens. `answers`: other
    texts than `answer`, by prompt."""

    def __init__(self, views: list[ServiceView], answer: list[int]) -> None:
        self.views = {view.settings.name: view for view in views}
        self.answer = answer
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.submitted: list[Generation] = []
        self.cancelled: list[int] = []
        self.failing: Finish | None = None
        self.fail_after = 0
        self.refusal: Exception | None = None
        self.device_state = "up"
        self.live: set[int] = set()
        self.states: dict[str, dict[str, object]] = {}
        self.draining = False
        self.kept: dict[str, float] = {}
        self.feed = EventFeed()
        self.maps: list[ArenaMap] = []
        self.loaded: list[str] = []
        self.evicted: list[str] = []
        self.operated: list[OperatorEvent] = []
        self.streams: dict[int, TokenStream] = {}
        self.idle = asyncio.Event()
        self.arrived = asyncio.Event()
        self._go = asyncio.Event()
        self._go.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def pause(self) -> None:
        """Hold back all tokens."""
        self._go.clear()

    def resume(self) -> None:
        """Let them flow."""
        self._go.set()

    def services(self) -> list[ServiceView]:
        return list(self.views.values())

    def service(self, name: str) -> ServiceView | None:
        return self.views.get(name)

    def submit(self, generations: list[Generation]) -> list[TokenStream]:
        if self.refusal is not None:
            raise self.refusal
        return [self._start(generation) for generation in generations]

    def cancel(self, request: int) -> None:
        if request in self.live:
            self.cancelled.append(request)
            self._over(request)
            self.streams[request].end(Finish(request, "cancelled"))

    def status(self) -> NodeStatus:
        device = DeviceStatus(
            device=0,
            label="fake",
            pid=1,
            state=self.device_state,
            capacity_bytes=1 << 20,
            weights_bytes=0,
            kv_bytes=1 << 18,
            free_bytes=3 << 18,
            cached_bytes=1 << 16,
            steps=7,
        )
        services = tuple(self._status(view) for view in self.views.values())
        return NodeStatus("round-robin", self.draining, 1 << 12, (device,), services)

    def detail(self, service: str) -> ServiceDetail | None:
        raise NotImplementedError

    def arena_maps(self, cells: int) -> list[ArenaMap]:  # noqa: ARG002
        return self.maps

    def plan(self) -> None:
        """Nothing is planned."""

    def hurry(self, service: str) -> None:
        """Nothing is examined here."""

    def keep(self, service: str, seconds: float) -> None:
        self.kept[service] = seconds

    async def operate(self, make: Callable[[int], OperatorEvent]) -> None:
        self.operated.append(make(0))

    def requests(self) -> list[RequestStatus]:
        raise NotImplementedError

    async def load(self, service: str, devices: tuple[int, ...] = ()) -> None:
        assert not devices, "HTTP clients have no say in that"
        if self.views[service].reason:
            raise ControlError(f"{service} cannot be loaded: {self.views[service].reason}")
        self.loaded.append(service)

    async def evict(self, service: str, now: bool) -> None:
        assert not now, "HTTP clients may not end others' requests"
        self.evicted.append(service)

    def _status(self, view: ServiceView) -> ServiceStatus:
        """Resident with some work, unless `states` has something else for the service."""
        fields: dict[str, object] = {
            "name": view.settings.name,
            "model": view.settings.model,
            "state": "refused" if view.reason else "probing" if view.shape is None else "resident",
            "pinned": view.settings.pinned,
            "device": 0,
            "stage": None,
            "weights_bytes": 4096,
            "kv_bytes": 1024,
            "context": 200,
            "dtype": "float32",
            "running": 0,
            "waiting": 0,
            "tokens_per_second": 0.0,
            "prompt_tokens": 11,
            "output_tokens": 22,
            "preemptions": 3,
            "swaps_in": 4,
            "last_swap_seconds": 0.5,
            "reason": view.reason,
            "devices": (0,),
        }
        return msgspec.convert({**fields, **self.states.get(view.settings.name, {})}, ServiceStatus)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, generation: Generation) -> TokenStream:
        self.submitted.append(generation)
        stream = self.streams[len(self.submitted)] = TokenStream(len(self.submitted))
        self.live.add(stream.request)
        self.idle.clear()
        self.arrived.set()
        task = asyncio.create_task(self._speak(generation, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _speak(self, generation: Generation, stream: TokenStream) -> None:
        if generation.sampling.pooling:
            await self._pool(generation, stream)
            return
        finish = Finish(stream.request, "length")
        for count, token in enumerate(self._tokens(generation)):
            await self._go.wait()
            await asyncio.sleep(0)
            if stream.request not in self.live:
                return
            if self.failing is not None and count == self.fail_after:
                finish = msgspec.structs.replace(self.failing, request=stream.request)
                break
            if not count:
                stream.cached = 2
            self._score(generation, stream, count, token)
            stream.push((token,))
            if token in generation.stop_ids:
                finish = Finish(stream.request, "stop")
                break
        self._over(stream.request)
        stream.end(finish)

    async def _pool(self, generation: Generation, stream: TokenStream) -> None:
        """In two parts, where it is a mean."""
        prompt, middle = generation.prompt, len(generation.prompt) // 2
        cuts = [0, middle] if generation.sampling.pooling == "mean" and middle else [0]
        if generation.sampling.pooling == "last":
            cuts = [len(prompt) - 1]
        for first, behind in zip(cuts, [*cuts[1:], len(prompt)], strict=True):
            await self._go.wait()
            await asyncio.sleep(0)
            if stream.request not in self.live:
                return
            sums = [sum(column) for column in zip(*map(hidden, prompt[first:behind]), strict=True)]
            stream.pool(Pooled(stream.request, first, behind - first, struct.pack("<4f", *sums)))
        self._over(stream.request)
        stream.end(self.failing or Finish(stream.request, "stop"))

    def _score(self, generation: Generation, stream: TokenStream, count: int, token: int) -> None:
        """Log-probabilities as a worker tells them; a prompt's come in two parts, before its first token."""
        prompt, sampling = generation.prompt, generation.sampling
        if not count and sampling.prompt_logprobs >= 0:
            middle = max(1, len(prompt) // 2)
            for begin, end in ((1, middle), (middle, len(prompt))):
                if begin < end:
                    stream.score(scores(begin, prompt[begin:end], sampling.prompt_logprobs))
        if sampling.logprobs >= 0:
            stream.score(scores(len(prompt) + count, (token,), sampling.logprobs))

    def _tokens(self, generation: Generation) -> list[int]:
        """The answer, over and over, up to the limit."""
        answer = self.answers.get(generation.prompt, self.answer)
        endless = answer * (generation.max_tokens // len(answer) + 1)
        return endless[: generation.max_tokens]

    def _over(self, request: int) -> None:
        self.live.discard(request)
        if not self.live:
            self.idle.set()

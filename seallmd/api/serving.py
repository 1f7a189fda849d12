"""What all generating endpoints share: from a checked body to a response, whatever its shape.

Owns finding the model, tokenizing its prompts, and the life of a request's choices. Must not know the fields
of bodies (`schema`, `ollama_schema`) and responses (`responses`, `ollama_responses`), nor routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from seallmd.api.charging import Charge, keyed
from seallmd.api.choices import Choice, Piece, Run
from seallmd.api.keys import current_key
from seallmd.api.limits import Constraints, build_generations
from seallmd.api.metrics import Metrics
from seallmd.api.rates import Rates
from seallmd.api.responses import Answer, Usage, count_usage, join
from seallmd.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from seallmd.api.settings import HttpSettings
from seallmd.api.structured import Form, Grammars
from seallmd.api.text import TextModel, TextModels
from seallmd.api.turns import TurnFormat
from seallmd.api.wire import EVENTS, Wire, send_stream
from seallmd.core.shapes import ModelShape
from seallmd.errors import RequestError
from seallmd.runtime.face import EngineFace, ServiceView

_PROBE_WAIT_SECONDS = 60.0
_PROBE_POLL_SECONDS = 0.1
_BODY_SECONDS = 120.0  # for a body to arrive, of 16 MiB by default


class Model(msgspec.Struct, frozen=True):
    """A service that can be served: its name, its files, its shape and its text side."""

    name: str
    directory: str
    shape: ModelShape
    text: TextModel


class Turn(msgspec.Struct, frozen=True):
    """What a chat's outputs are: how they are written, and what they must look like, if anything."""

    format: TurnFormat
    form: Form | None


class Serving:
    """The engine and the models' texts, as endpoints use them."""

    def __init__(self, engine: EngineFace, settings: HttpSettings, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics
        self.texts = TextModels()
        self._grammars = Grammars()
        self.rates = Rates()
        self._ping_seconds = settings.ping_seconds
        self._write_seconds = settings.write_seconds

    async def close(self) -> None:
        """Called when the application ends."""
        await self.texts.close()
        await self._grammars.close()

    def views(self) -> list[ServiceView]:
        """The services that are there for whoever asks."""
        key = current_key.get()
        return [view for view in self.engine.services() if key is None or key.allows(view.settings.name)]

    def view(self, name: str) -> ServiceView:
        """A service by name. Raises RequestError (404)."""
        view, key = self.engine.service(name), current_key.get()
        if view is None or (key is not None and not key.allows(name)):
            message = f"the model {name[:128]!r} does not exist"
            raise RequestError(message, status=404, code="model_not_found", param="model")
        return view

    async def model(self, name: str) -> Model:
        """A service's shape and text side; at start this waits until the service was examined."""
        view = self.view(name)
        if view.shape is None and not view.reason:
            self.engine.hurry(name)
        for _ in range(int(_PROBE_WAIT_SECONDS / _PROBE_POLL_SECONDS)):
            if view.reason:
                message = f"the model {name!r} cannot be served: {view.reason}"
                raise RequestError(message, status=503, code="model_unavailable", param="model")
            if view.shape is not None and view.directory is not None:
                return Model(name, view.directory, view.shape, await self.texts.get(view.directory))
            await asyncio.sleep(_PROBE_POLL_SECONDS)
            view = self.view(name)
        message = f"the model {name!r} is still being examined"
        raise RequestError(message, status=503, code="model_loading", retry_after=10.0)

    async def encode(
        self, model: Model, prompt: str | list[int], *, add_special_tokens: bool = True
    ) -> list[int]:
        """A prompt's token ids: special tokens lead a text, ids are taken as they are."""
        if isinstance(prompt, list):
            return prompt
        return await self.texts.encode(model.text, prompt, add_special_tokens=add_special_tokens)

    async def constraints(self, spec: GenerationRequest, model: Model, form: Form | None) -> Constraints:
        """What the request forbids, in the model's tokens. form: what its outputs must look like."""
        words = {
            tuple(await self.texts.encode(model.text, space + bare, add_special_tokens=False))
            for word in spec.bad_words or ()
            for bare in (word.lstrip(" ") or word,)
            for space in ("", " ")  # at the beginning of a line, and behind another word
        }
        grammar = ""
        if form is not None:
            grammar = await self._grammars.compile(form, model.directory, model.shape)
        return Constraints(tuple(sorted(words - {()})), grammar)

    async def generate(
        self,
        request: web.Request | None,
        spec: CompletionRequest | ChatRequest,
        model: Model,
        prompts: list[list[int]],
        answer: Answer,
        wire: Wire = EVENTS,
        turn: Turn | None = None,
    ) -> web.StreamResponse:
        """Run all choices of all prompts; whatever happens, none outlives the call.

        request: whose connection a stream goes to; None: there is none, and nothing is streamed. turn: of a
        chat.
        """
        # Everything is checked before anything is started.
        if spec.stream and request is None:
            raise RequestError("this is answered in one piece: `stream` must be false", param="stream")
        form = spec.form if turn is None else turn.form
        constraints = await self.constraints(spec, model, form)
        batches = [
            keyed(generations, spec.service_tier)
            for generations in build_generations(spec, model.shape, prompts, constraints)
        ]
        charge = Charge(self.rates, self.metrics, batches)
        run = Run(self.engine, self.metrics)
        goes_on = isinstance(spec, CompletionRequest) or bool(spec.continue_final_message)
        try:
            for generations in batches:
                leader = None
                for generation, stream in zip(generations, run.submit(generations), strict=True):
                    prime = generation.prompt if goes_on else ()
                    choice = Choice(
                        len(run.choices),
                        generation,
                        stream,
                        model.text.detokenizer(
                            prime,
                            skip_special=spec.skip_special_tokens is not False,
                            keep=() if turn is None else turn.format.markers,
                        ),
                        spec.stops,
                        include_stop=bool(spec.include_stop_str_in_output),
                        silent=spec.output_limit == 0,
                        leader=leader,
                    )
                    leader = leader or choice
                    run.choices.append(choice)
            if spec.stream and request is not None:
                documents = _documents(spec, run, answer, wire)
                return await send_stream(request, documents, wire, self._ping_seconds, self._write_seconds)
            return await _whole(spec, run, answer)
        finally:
            charge.settle(run.used)
            await run.close()


async def read_body(request: web.Request) -> bytes:
    """The body. Raises RequestError for what says it is not JSON: a web page's form needs no permission."""
    if "Content-Type" in request.headers and request.content_type != "application/json":
        raise RequestError("the body must be application/json", status=415)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("the body must not be compressed", status=415)
    return await receive(request)


async def receive(request: web.Request) -> bytes:
    """The body, whatever it is. Raises RequestError for a client that sends it too slowly."""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise RequestError("the body has stalled", status=408) from None


def json_response(body: object) -> web.Response:
    """200 with a JSON document."""
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


async def _whole(spec: GenerationRequest, run: Run, answer: Answer) -> web.Response:
    parts: list[list[Piece]] = [[] for _ in run.choices]
    async for piece in run.pieces():
        parts[piece.index].append(piece)
    usage = count_usage(run.choices, spec.choices)

    def word() -> web.Response:
        return json_response(answer.whole(run.choices, [join(pieces) for pieces in parts], usage))

    if max(spec.output_top, spec.prompt_top) < 0:
        return word()
    return await asyncio.to_thread(word)  # seconds, for the log-probabilities of long texts


async def _documents(spec: GenerationRequest, run: Run, answer: Answer, wire: Wire) -> AsyncIterator[bytes]:
    """The documents of a stream."""
    options = spec.stream_options
    want_usage = options is not None and bool(options.include_usage)
    continuous = want_usage and options is not None and bool(options.continuous_usage_stats)
    begun = set[int]()

    def word(piece: Piece, usage: Usage | UnsetType | None) -> list[bytes]:
        return [wire.encode(chunk) for chunk in answer.chunks(run.choices[piece.index], piece, usage)]

    async for piece in run.pieces():
        usage: Usage | UnsetType | None = None if want_usage else UNSET
        if continuous:
            usage = count_usage(run.choices, spec.choices)
        if spec.prompt_top < 0 or piece.index in begun:
            documents = word(piece, usage)
        else:  # a prompt's log-probabilities come with a choice's first piece
            begun.add(piece.index)
            documents = await asyncio.to_thread(word, piece, usage)
        for document in documents:
            yield document
    last = answer.usage_chunk(count_usage(run.choices, spec.choices)) if want_usage else None
    if last is not None:
        yield wire.encode(last)

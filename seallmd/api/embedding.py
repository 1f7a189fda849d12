"""From token ids to vectors: what /v1/embeddings and Ollama's /api/embed share.

Owns the requests that this takes of the engine, putting their parts together, and cutting and scaling
vectors. Must not know HTTP, nor the shape of bodies and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from seallmd.api.charging import Charge, keyed
from seallmd.api.choices import Run, failure
from seallmd.api.limits import check_token_ids
from seallmd.api.serving import Model, Serving
from seallmd.core.messages import Pooled, Sampling
from seallmd.errors import RequestError
from seallmd.runtime.face import Generation, TokenStream

# Of one HTTP request at a time: a list of texts must not fill the queue that others wait in too.
_AT_ONCE = 64

Vector = NDArray[np.float32]


class Wanted(msgspec.Struct, frozen=True):
    """How vectors are to be. dimensions: how many of the first ones to keep, None = all. normalize: to length
    1, of what is kept."""

    dimensions: int | None = None
    normalize: bool = True


def pooling_of(serving: Serving, name: str) -> Literal["mean", "last"]:
    """How a service pools. Raises RequestError (400) where it is not configured to."""
    pooling = serving.view(name).settings.pooling
    if pooling == "none":
        raise RequestError(
            f'the model {name!r} is not configured to give embeddings: write pooling = "mean" or "last", '
            "whichever it was trained for, into its [[service]] table",
            code="embeddings_not_configured",
            param="model",
        )
    return pooling


async def embed(
    serving: Serving, model: Model, inputs: Sequence[list[int]], wanted: Wanted, salt: str = ""
) -> list[Vector]:
    """A vector for each input; whatever happens, nothing goes on in the engine afterwards.

    Raises RequestError: ids that the model does not have, too long an input, too many dimensions.
    """
    if wanted.dimensions is not None and wanted.dimensions > model.shape.hidden:
        raise RequestError(
            f"this model's vectors have {model.shape.hidden} dimensions, not {wanted.dimensions}",
            param="dimensions",
        )
    sampling = Sampling(pooling=pooling_of(serving, model.name))
    generations = []
    for tokens in inputs:
        _check(tokens, model)
        generations += keyed([Generation(model.name, tuple(tokens), 0, sampling, salt=salt)])
    charge = Charge(serving.rates, serving.metrics, [generations])
    run = Run(serving.engine, serving.metrics)
    streams, vectors, used = list[TokenStream](), list[Vector](), 0
    try:
        for generation in generations:
            if len(streams) - len(vectors) >= _AT_ONCE:
                vectors.append(await _vector(streams[len(vectors)], wanted))
            streams += run.submit([generation])
        while len(vectors) < len(streams):
            vectors.append(await _vector(streams[len(vectors)], wanted))
        return vectors
    finally:
        for generation, stream in zip(generations, streams, strict=False):
            used += len(generation.prompt) if stream.pooled else 0
        charge.settle(used)
        await run.close()


def _check(tokens: list[int], model: Model) -> None:
    if not tokens:
        raise RequestError("`input` has an entry without any token", param="input")
    check_token_ids(tokens, model.shape.vocab, "input")
    if len(tokens) > model.shape.context:
        raise RequestError(
            f"this model's maximum context length is {model.shape.context} tokens, "
            f"but an input has {len(tokens)}",
            code="context_length_exceeded",
            param="input",
        )


async def _vector(stream: TokenStream, wanted: Wanted) -> Vector:
    """What has been pooled, once the engine is done with it. Raises RequestError."""
    async for _ in stream.batches():  # no token comes, but the end
        pass
    assert stream.finish is not None
    if stream.finish.reason != "stop":
        raise failure(stream.finish)
    vector = _mean(stream.pooled)[: wanted.dimensions]
    if not np.isfinite(vector).all():
        raise RequestError("the model's hidden states are not finite", status=500, code="not_finite")
    if wanted.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector.astype(np.float32)


def _mean(parts: Sequence[Pooled]) -> NDArray[np.float64]:
    """Of all tokens; added up in float64, so that it does not matter how the prompt was cut."""
    total = np.sum([np.frombuffer(part.sum, "<f4").astype(np.float64) for part in parts], axis=0)
    mean: NDArray[np.float64] = total / sum(part.tokens for part in parts)
    return mean

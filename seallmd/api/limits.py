"""From a request and a model to what the engine takes.

Owns the checks that need the model (vocabulary, context) and the building of `Generation`. Must not
know HTTP.
"""

from __future__ import annotations

import secrets

from seallmd.api.schema import CompletionRequest, GenerationRequest
from seallmd.core.messages import ModelShape, Sampling
from seallmd.errors import RequestError
from seallmd.runtime.face import Generation

_DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = (1 << 63) - 1


def build_generations(request: GenerationRequest, shape: ModelShape, prompt: list[int]) -> list[Generation]:
    """The n choices of one prompt, alike but for their seeds. Raises RequestError."""
    check_token_ids(prompt, shape.vocab, "prompt")
    max_tokens = _max_tokens(request, shape.context, len(prompt))
    stop_ids = _stop_ids(request, shape)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return [
        Generation(
            service=request.model,
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=_sampling(request, shape, stop_ids, (seed + choice) & _SEED_MASK),
            stop_ids=stop_ids,
            salt=request.cache_salt or "",
        )
        for choice in range(request.choices)
    ]


def check_token_ids(ids: list[int], vocab: int, param: str) -> None:
    """Refuse ids that the model has no row for: a worker would read outside its tables."""
    highest = max(ids, default=0)
    if highest >= vocab:
        raise RequestError(
            f"`{param}`: token id {highest} is not below {vocab}, the vocabulary's size", param=param
        )


def _max_tokens(request: GenerationRequest, context: int, prompt: int) -> int:
    """How many tokens may be generated; what the client did not ask for is fitted to the context."""
    room = context - prompt
    wanted = request.output_limit
    if room < 1 or (wanted or 0) > room:
        output = f" and {wanted} for the output" if wanted else ""
        raise RequestError(
            f"this model's maximum context length is {context} tokens, "
            f"but the request has {prompt} in the prompt{output}",
            code="context_length_exceeded",
            param="prompt" if isinstance(request, CompletionRequest) else "messages",
        )
    if wanted is None:
        wanted = min(room, _DEFAULT_COMPLETION_TOKENS) if isinstance(request, CompletionRequest) else room
    if (request.min_tokens or 0) > wanted:
        raise RequestError(f"`min_tokens` is over the limit of {wanted} output tokens", param="min_tokens")
    return wanted


def _stop_ids(request: GenerationRequest, shape: ModelShape) -> tuple[int, ...]:
    own = request.stop_token_ids or []
    check_token_ids(own, shape.vocab, "stop_token_ids")
    eos = () if request.ignore_eos else shape.eos
    return tuple(dict.fromkeys((*eos, *own)))


def _sampling(
    request: GenerationRequest, shape: ModelShape, stop_ids: tuple[int, ...], seed: int
) -> Sampling:
    min_tokens = request.min_tokens or 0
    return Sampling(
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),  # OpenAI-like servers take -1 for "off" too
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request, shape.vocab),
        seed=seed,
        min_tokens=min_tokens,
        banned=stop_ids if min_tokens else (),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(request: GenerationRequest, vocab: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (request.logit_bias or {}).items():
        # isdecimal alone lets other scripts' digits through; a length limit keeps int() cheap.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(
                f"`logit_bias` has a key that is no token id: {key[:40]!r}", param="logit_bias"
            )
        pairs.append((int(key), bias))
    check_token_ids([token for token, _ in pairs], vocab, "logit_bias")
    return tuple(pairs)

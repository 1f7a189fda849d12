"""From a request and a model to what the engine takes.

Owns the checks that need the model (vocabulary, context) and the building of `Generation`. Must not
know HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from seallmd.api.schema import CompletionRequest, GenerationRequest
from seallmd.core.messages import Grammar, Sampling
from seallmd.core.shapes import ModelShape
from seallmd.errors import RequestError
from seallmd.runtime.face import Generation

_DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = (1 << 63) - 1
# Log-probabilities of one request, alternatives included: of the prompts, which come all at once and take
# some 100 bytes each in an answer, and of the outputs.
MAX_PROMPT_SCORES = 1 << 20
MAX_OUTPUT_SCORES = 1 << 22


class Constraints(msgspec.Struct, frozen=True):
    """What a request forbids in terms of the model's own tokens.

    bad_words: sequences that must not occur. grammar: what the output must match, for workers; empty = none.
    """

    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""


def build_generations(
    request: GenerationRequest,
    shape: ModelShape,
    prompts: Sequence[list[int]],
    constraints: Constraints,
) -> list[list[Generation]]:
    """The n choices of each prompt, alike but for their seeds. Raises RequestError."""
    batches = [_choices(request, shape, prompt, constraints) for prompt in prompts]
    _check_scores(request, batches)
    return batches


def truncated(request: GenerationRequest, context: int, prompt: list[int]) -> list[int]:
    """The end of a prompt, as much of it as the client wants at most; -1 is what fits with the output."""
    room = max(1, context - max(1, request.output_limit or 1))
    return last_of(prompt, request.truncate_prompt_tokens, room)


def last_of(tokens: list[int], limit: int | None, room: int) -> list[int]:
    """The last so many tokens, all without a limit; -1 is as many as there is room for."""
    if limit == 0:
        raise RequestError("`truncate_prompt_tokens` leaves nothing", param="truncate_prompt_tokens")
    return tokens if limit is None else tokens[-(room if limit == -1 else limit) :]


def check_token_ids(ids: list[int], vocab: int, param: str) -> None:
    """Refuse ids that the model has no row for: a worker would read outside its tables."""
    highest = max(ids, default=0)
    if highest >= vocab:
        raise RequestError(
            f"`{param}`: token id {highest} is not below {vocab}, the vocabulary's size", param=param
        )


def _choices(
    request: GenerationRequest, shape: ModelShape, prompt: list[int], constraints: Constraints
) -> list[Generation]:
    check_token_ids(prompt, shape.vocab, "prompt")
    ids = tuple(prompt)  # one for all choices: prompts are long, and choices many
    max_tokens = _max_tokens(request, shape.context, len(prompt))
    stop_ids = _stop_ids(request, shape, constraints)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    sampling = _sampling(request, shape, stop_ids, constraints)
    return [
        Generation(
            service=request.model,
            prompt=ids,
            max_tokens=max_tokens,
            sampling=msgspec.structs.replace(
                sampling,
                seed=(seed + choice) & _SEED_MASK,
                prompt_logprobs=-1 if choice else request.prompt_top,  # one prompt, told once
            ),
            stop_ids=stop_ids,
            salt=request.cache_salt or "",
        )
        for choice in range(request.choices)
    ]


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
    return max(1, wanted)  # that a token was drawn is how the end of a prompt is told


def _check_scores(request: GenerationRequest, batches: list[list[Generation]]) -> None:
    told = request.choices if isinstance(request, CompletionRequest) else 1  # completions tell each choice
    prompts = (1 + request.prompt_top) * sum(len(batch[0].prompt) for batch in batches) * told
    if prompts > MAX_PROMPT_SCORES:
        raise RequestError(
            f"{prompts} log-probabilities of the prompt are wanted, at most {MAX_PROMPT_SCORES} are told",
            param="prompt_logprobs" if request.prompt_logprobs is not None else "logprobs",
        )
    output = (1 + request.output_top) * sum(g.max_tokens for batch in batches for g in batch)
    if output > MAX_OUTPUT_SCORES:
        raise RequestError(
            f"{output} log-probabilities may come of this, at most {MAX_OUTPUT_SCORES} are told: "
            "lower `n`, the output's limit or the number of alternatives",
            param="logprobs",
        )


def _stop_ids(request: GenerationRequest, shape: ModelShape, constraints: Constraints) -> tuple[int, ...]:
    """An output that has a form ends with it, even where it is to go on otherwise."""
    own = request.stop_token_ids or []
    check_token_ids(own, shape.vocab, "stop_token_ids")
    eos = () if request.ignore_eos and not constraints.grammar else shape.eos
    return tuple(dict.fromkeys((*eos, *own)))


def _sampling(
    request: GenerationRequest, shape: ModelShape, stop_ids: tuple[int, ...], constraints: Constraints
) -> Sampling:
    """All but the seed."""
    min_tokens = request.min_tokens or 0
    allowed = request.allowed_token_ids or []
    check_token_ids(allowed, shape.vocab, "allowed_token_ids")
    return Sampling(
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),  # OpenAI-like servers take -1 for "off" too
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request, shape.vocab),
        min_tokens=min_tokens,
        banned=stop_ids if min_tokens else (),
        logprobs=request.output_top,
        allowed=tuple(allowed),
        bad_words=constraints.bad_words,
        grammar=Grammar(constraints.grammar, stop_ids) if constraints.grammar else None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(request: GenerationRequest, vocab: int) -> tuple[tuple[int, float], ...]:
    biases = dict[int, float]()  # "7" and "07" are one id, whose bias must not add up
    for key, bias in (request.logit_bias or {}).items():
        # isdecimal alone lets other scripts' digits through; a length limit keeps int() cheap.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(
                f"`logit_bias` has a key that is no token id: {key[:40]!r}", param="logit_bias"
            )
        biases[int(key)] = bias
    check_token_ids(list(biases), vocab, "logit_bias")
    return tuple(biases.items())

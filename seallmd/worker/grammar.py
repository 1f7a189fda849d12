"""Grammars that outputs must match: which ids a row may draw next.

Owns compiling, in a thread beside the step, and following each request's output token by token. It lives in
the worker because the next row of a request runs before the daemon has seen the token that decides on its
mask. The daemon has compiled every grammar once before, in a process that may be killed, and within the same
limits (`messages.GRAMMAR_LIMITS`); they bound what each step of one may take. Must not know steps or logits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillCompiling
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from seallmd.core.messages import GRAMMAR_LIMITS, Grammar, RowFailed
from seallmd.worker.sampler import Draw

_KEPT_GRAMMARS = 32
_COMPILE_SECONDS = 20.0  # a tokenizer of 262144 tokens included


class GrammarFailed(Exception):
    """The grammar cannot be followed any further; only its own request suffers."""


class Origin(NamedTuple):
    """Whose tokens they are. directory: of the model; vocabulary: ids that its output layer knows; end: the
    id that ends its texts, which tokenizers do not tell."""

    directory: str
    vocabulary: int
    end: int


class Matcher:
    """One request's way through its grammar; nothing but the output decides where it is."""

    def __init__(self, compiled: Future[LLMatcher], ends: Sequence[int]) -> None:
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._ends = frozenset(ends)
        self._taken = 0
        self._over = False

    def mask(self, output: Sequence[int]) -> np.ndarray | None:
        """Bool [vocabulary], true for ids that may follow the output; None once it has ended.

        Waits until the grammar is compiled. Raises GrammarFailed.
        """
        matcher = self._matcher or self._begin()
        for token in output[self._taken :]:
            self._taken += 1
            self._over = self._over or (token in self._ends and matcher.is_accepting())
            if not self._over and not matcher.consume_token(token):
                raise GrammarFailed(_reason(matcher))
        if self._over:  # a row that was on its way already
            return None
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise GrammarFailed(_reason(matcher))
        mask = np.unpackbits(bits, bitorder="little").astype(bool)
        mask[[end for end in self._ends if end < len(mask)]] |= matcher.is_accepting()
        return mask

    def _begin(self) -> LLMatcher:
        try:
            matcher = self._compiled.result(timeout=_COMPILE_SECONDS).deep_copy()
        except StillCompiling:
            raise GrammarFailed("it takes too long to compile") from None
        except (OSError, ValueError, RuntimeError) as error:  # the tokenizer cannot be read
            raise GrammarFailed(str(error)) from None
        if matcher.is_error():
            raise GrammarFailed(_reason(matcher))
        self._matcher = matcher
        return matcher


class Grammars:
    """Compiled grammars, the latest ones kept, and the tokenizers that they need."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizers: dict[Origin, LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[Origin, str], Future[LLMatcher]] = OrderedDict()

    def begin(self, grammar: Grammar, directory: str, vocabulary: int) -> Matcher:
        """Start to compile; `Matcher.mask` waits for it. Arguments as in `Origin`."""
        key = (Origin(directory, vocabulary, grammar.ends[0]), grammar.text)
        if key not in self._compiled:
            self._compiled[key] = self._thread.submit(self._compile, *key)
            if len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Matcher(self._compiled[key], grammar.ends)

    def _compile(self, origin: Origin, text: str) -> LLMatcher:
        tokenizer = self._tokenizers.get(origin)
        if tokenizer is None:
            file = Path(origin.directory) / "tokenizer.json"
            text_of_file = file.read_text(encoding="utf-8")
            tokenizer = LLTokenizer(text_of_file, n_vocab=origin.vocabulary, eos_token=origin.end)
            self._tokenizers[origin] = tokenizer
        limits = LLParserLimits(**GRAMMAR_LIMITS)  # type: ignore[arg-type]  # all of them are numbers
        return LLMatcher(tokenizer, text, log_level=0, limits=limits)


def masks_of(
    draws: Sequence[Draw], matchers: Sequence[Matcher | None], requests: Sequence[int]
) -> tuple[dict[int, torch.Tensor], tuple[RowFailed, ...]]:
    """By row, which ids it may draw (bool, on the host); and the rows whose grammars cannot be followed."""
    masks, failed = {}, list[RowFailed]()
    for row, matcher in enumerate(matchers):
        if matcher is None:
            continue
        draw = draws[row]
        try:
            mask = matcher.mask(draw.tokens[draw.prompt :])
        except GrammarFailed as error:
            failed.append(RowFailed(requests[row], str(error)))
        else:
            if mask is not None:
                masks[row] = torch.from_numpy(mask)
    return masks, tuple(failed)


def _reason(matcher: LLMatcher) -> str:
    """The first line of what llguidance says; stacks follow."""
    return (matcher.get_error().partition("\n")[0] or "the output left the grammar")[:200]

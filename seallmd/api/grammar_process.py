"""The process that compiles grammars before anybody relies on them: `python -m seallmd.api.grammar_process`.

Owns turning what clients send (JSON schema, regular expression, choice, grammar) into a grammar that workers
understand, and trying it: compiled within the workers' limits, with the model's own tokens, up to the first
mask. What is too much for that ends this process, and no worker ever sees it. Must not know the daemon: it
reads `Job` lines from stdin, answers `Compiled` lines on stdout, and ends with its stdin.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from seallmd.api.helper_main import answer_jobs
from seallmd.core.messages import GRAMMAR_LIMITS

MAX_GRAMMAR_CHARACTERS = 1 << 18  # of what a worker gets
_MAX_COMPILE_SECONDS = 2.0  # of computing; a worker does it again
_MAX_MEMORY_BYTES = 3 << 30
_MAX_ERROR_CHARACTERS = 300
_KEPT_TOKENIZERS = 4
# Without a bound, a small model may fill an answer with spaces.
_JSON_OPTIONS = {"whitespace_pattern": "[ \\n\\t]{1,20}"}

Kind = Literal["json", "regex", "choice", "lark"]


class Job(msgspec.Struct, frozen=True):
    """Compile `text`. kind: of the text; a choice is a JSON list of strings, lark is Lark or GBNF.

    directory: of the model; vocabulary: ids that its output layer knows; end: the id that ends its texts.
    before: a grammar that has this one as `@answer`; empty = none.
    """

    kind: Kind
    text: str
    directory: str
    vocabulary: int
    end: int
    before: str = ""


class Compiled(msgspec.Struct, frozen=True, omit_defaults=True):
    """The grammar for the workers, or why there is none (one short line)."""

    text: str = ""
    error: str = ""


def translate(kind: Kind, text: str) -> str:
    """A grammar in llguidance's terms. Raises ValueError."""
    match kind:
        case "json":
            options: Any = _JSON_OPTIONS
            return str(LLMatcher.grammar_from_json_schema(text, defaults=options))
        case "regex":
            return str(LLMatcher.grammar_from_regex(text))
        case "choice":
            return "start: " + " | ".join(
                json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)
            )
        case "lark":
            return str(LLMatcher.grammar_from_lark(any_to_lark(text)))


def behind(before: str, grammar: str) -> str:
    """Both as one grammar. grammar: from `translate`; it becomes `@answer`."""
    lark = not grammar.lstrip().startswith("{")
    answer, *more = [{"lark_grammar": grammar}] if lark else json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": before}, {**answer, "name": "answer"}, *more]})


@lru_cache(_KEPT_TOKENIZERS)
def _tokenizer(directory: str, vocabulary: int, end: int) -> LLTokenizer:
    text = (Path(directory) / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocabulary, eos_token=end)


def compile_grammar(job: Job) -> Compiled:
    """Compile one job. Whatever is wrong with the grammar is an answer, not an exception."""
    tokenizer = _tokenizer(job.directory, job.vocabulary, job.end)
    began = time.process_time()
    try:
        text = translate(job.kind, job.text)
        text = behind(job.before, text) if job.before else text
    except Exception as error:  # noqa: BLE001 - the translator is made for good input
        return Compiled(error=_short(str(error) or type(error).__name__))
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        return Compiled(error=f"it is longer than {MAX_GRAMMAR_CHARACTERS} characters")
    limits = LLParserLimits(**cast(dict[str, Any], GRAMMAR_LIMITS))
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return Compiled(error=_short(matcher.get_error()))
    if matcher.is_stopped():
        return Compiled(error="it allows the empty text alone")
    if time.process_time() - began > _MAX_COMPILE_SECONDS:
        return Compiled(error="it takes too long to compile")
    return Compiled(text)


def _short(reason: str) -> str:
    """Pictures of the place, on the lines after the first, do not fit one line; stacks are not shown."""
    return " ".join(reason.partition("\n")[0].split())[:_MAX_ERROR_CHARACTERS]


if __name__ == "__main__":
    answer_jobs(Job, compile_grammar, memory_bytes=_MAX_MEMORY_BYTES)

"""The process that renders chat templates: `python -m seallmd.api.template_process`.

Owns the Jinja environment and its limits. Must not know the daemon: it reads `Job` lines from stdin, answers
`Rendered` lines on stdout, and ends with its stdin. A template comes with a model from elsewhere. The sandbox
keeps it from the interpreter, but not from looping for ever or filling the memory: a process can be limited
and killed, a thread cannot.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from seallmd.api.helper_main import answer_jobs

MAX_RENDERED_CHARACTERS = 1 << 25
_MAX_MEMORY_BYTES = 1 << 30
_MAX_ERROR_CHARACTERS = 300
_KEPT_TEMPLATES = 64


class Job(msgspec.Struct, frozen=True):
    """Render `template` with `variables` (plain JSON values)."""

    template: str
    variables: dict[str, Any]


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The text, or why there is none (one short line)."""

    text: str = ""
    error: str = ""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training. Here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were never trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=_KEPT_TEMPLATES)
def compile_template(source: str) -> jinja2.Template:
    """Compile as transformers does (utils/chat_template_utils.py), so that templates mean the same here."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def render(job: Job) -> Rendered:
    """Render one job. Whatever a template does wrong is an answer, not an exception."""
    pieces: list[str] = []
    size = 0
    try:
        for piece in compile_template(job.template).generate(job.variables):
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS:
                return Rendered(error="the chat template's output is too long")
            pieces.append(piece)
    except MemoryError:
        pieces.clear()
        return Rendered(error="the chat template needs too much memory")
    except Exception as error:  # noqa: BLE001 - the template is foreign code, it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        return Rendered(error=reason[:_MAX_ERROR_CHARACTERS])
    return Rendered(text="".join(pieces))


if __name__ == "__main__":
    answer_jobs(Job, render, memory_bytes=_MAX_MEMORY_BYTES)

"""Structured outputs: what of a request's fields is a grammar, and its way to one that workers take.

Owns the fields (`response_format`, vLLM's `structured_outputs`), what is remembered of compiled grammars and
how many may be waited for. Must not know HTTP or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seallmd.api.grammar_process import Compiled, Job, Kind
from seallmd.api.helper import HelperFailed, HelperProcess
from seallmd.core.shapes import ModelShape
from seallmd.errors import RequestError

COMPILE_SECONDS = 10.0  # of one grammar, a model's tokens read for the first time included
_LINE_BYTES = 8 << 20
_MAX_TEXT = 1 << 17  # characters of what a client may send
_MAX_WAITING = 32
_KEPT = 128

_Text = Annotated[str, Meta(min_length=1, max_length=_MAX_TEXT)]


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's; a schema is enforced whether `strict` or not."""

    name: Annotated[str, Meta(max_length=256)] = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's `structured_outputs`: one of these. json: a schema, as text or not. grammar: Lark or GBNF."""

    json: _Text | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: _Text | None = None
    choice: Annotated[list[_Text], Meta(min_length=1, max_length=1024)] | None = None
    grammar: _Text | None = None


class Form(msgspec.Struct, frozen=True):
    """What an output must look like. param: the field that says so.

    before: a grammar (Lark) of what may come first, with `@answer` where this form is; empty = nothing.
    """

    kind: Kind
    text: str
    param: str
    before: str = ""


_ANY_OBJECT = '{"type":"object"}'


def wanted_form(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Form | None:
    """The form that the fields ask for, if any. Raises RequestError."""
    forms = [*_of_format(response_format), *_of_structured(structured)]
    if len(forms) > 1:
        param = forms[1].param
        raise RequestError(f"`{param}`: only one form can be asked for", param=param)
    for form in forms:
        if len(form.text) > _MAX_TEXT:
            raise RequestError(f"`{form.param}` is longer than {_MAX_TEXT} characters", param=form.param)
        return form
    return None


def _of_format(wanted: ResponseFormat | None) -> list[Form]:
    param = "response_format"
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [Form("json", _ANY_OBJECT, param)]
    if wanted.json_schema is None:
        raise RequestError("`response_format` needs `json_schema`", param=param)
    schema = wanted.json_schema.schema
    return [Form("json", _ANY_OBJECT if schema is None else _json(schema), param)]


def _of_structured(wanted: StructuredOutputs | None) -> list[Form]:
    param, forms = "structured_outputs", list[Form]()
    if wanted is None:
        return []
    if wanted.json is not None:
        text = wanted.json if isinstance(wanted.json, str) else _json(wanted.json)
        forms.append(Form("json", text, param))
    if wanted.json_object:
        forms.append(Form("json", _ANY_OBJECT, param))
    if wanted.regex is not None:
        forms.append(Form("regex", wanted.regex, param))
    if wanted.choice is not None:
        forms.append(Form("choice", _json(wanted.choice), param))
    if wanted.grammar is not None:
        forms.append(Form("lark", wanted.grammar, param))
    return forms


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class Grammars:
    """Compiles forms in a process of their own; the latest outcomes are remembered, bad ones too."""

    def __init__(self, seconds: float = COMPILE_SECONDS) -> None:
        """seconds: limit of one compilation; what takes longer is killed."""
        module = "seallmd.api.grammar_process"
        self.helper = HelperProcess(module, Compiled, seconds=seconds, line_bytes=_LINE_BYTES)
        self._known: OrderedDict[Job, Compiled] = OrderedDict()
        self._waiting = 0

    async def compile(self, form: Form, directory: str, shape: ModelShape) -> str:
        """A grammar that workers take, for a model's tokens. Raises RequestError."""
        if not shape.eos:
            raise RequestError("this model has no token that ends a text", param=form.param)
        job = Job(form.kind, form.text, directory, shape.vocab, shape.eos[0], form.before)
        if job not in self._known:
            self._known[job] = await self._ask(job, form.param)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(job)
        compiled = self._known[job]
        if compiled.error:
            raise RequestError(
                f"`{form.param}` cannot be followed: {compiled.error}",
                param=form.param,
                code="invalid_grammar",
            )
        return compiled.text

    async def close(self) -> None:
        """End the process."""
        await self.helper.close()

    async def _ask(self, job: Job, param: str) -> Compiled:
        if self._waiting >= _MAX_WAITING:
            raise RequestError("too many grammars wait", status=503, code="overloaded", retry_after=1.0)
        self._waiting += 1
        try:
            return await self.helper.ask(job)
        except TimeoutError:  # not remembered: the machine may just be busy
            raise RequestError(f"`{param}` takes too long to compile", param=param) from None
        except HelperFailed:
            raise RequestError(f"`{param}` is too much to compile", param=param) from None
        finally:
            self._waiting -= 1

"""Tools of a chat: what clients send, what the template is told, and what the model must write.

Owns the fields and what follows from them. Must not know HTTP, nor how calls are read (`tool_reader`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seallmd.api.structured import Form
from seallmd.api.text import TextModel
from seallmd.api.tool_formats import ParserName, ToolFormat, calls_grammar, choose_format
from seallmd.errors import RequestError

FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function. parameters: JSON schema of its arguments; strict means nothing more here."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, frozen=True):
    """A function by name."""

    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True):
    """`tool_choice` that names one."""

    type: Literal["function"]
    function: NamedFunction


Choice = Literal["none", "auto", "required"] | NamedTool


class Tools(msgspec.Struct, frozen=True):
    """The tools of one request. choice: as OpenAI means it when it is left out, too."""

    tools: list[Tool]
    choice: Choice
    several: bool

    @classmethod
    def of(cls, tools: list[Tool] | None, choice: Choice | None, parallel: bool | None) -> Tools | None:
        """None where no call can come of it. Raises RequestError."""
        forced = choice not in (None, "none", "auto")
        if not tools:
            if forced:
                raise RequestError("`tool_choice` needs `tools`", param="tool_choice")
            return None
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise RequestError("`tools` has two functions of one name", param="tools")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise RequestError(f"`tool_choice` names no tool: {choice.function.name!r}", param="tool_choice")
        return None if choice == "none" else cls(tools, choice or "auto", parallel is not False)

    @property
    def forced(self) -> bool:
        """Whether the model must call."""
        return self.choice != "auto"

    def format(self, model: TextModel, parser: ParserName) -> ToolFormat:
        """How the model writes calls. Raises RequestError."""
        template = model.template.source if model.template is not None else ""
        found = choose_format(parser, template)
        if found is None:
            raise RequestError("this model is configured without tools", param="tools")
        return found

    def form(self, format_: ToolFormat, model: TextModel, wanted: Form | None) -> Form | None:
        """What the output must match. wanted: what the rest of the request asks for. Raises RequestError."""
        if wanted is not None and (self.forced or wanted.kind != "json"):
            param = wanted.param
            raise RequestError(f"`{param}` and tools that must be called exclude each other", param=param)
        if not self.forced and wanted is None:
            return None
        functions = [
            (tool.function.name, _arguments_schema(tool.function))
            for tool in self.tools
            if not isinstance(self.choice, NamedTool) or tool.function.name == self.choice.function.name
        ]
        text = calls_grammar(
            format_,
            functions,
            several=self.several and not isinstance(self.choice, NamedTool),
            added=model.added_id,
            instead="" if wanted is None else wanted.text,
        )
        return Form("lark", text, "tools" if wanted is None else wanted.param)

    def shown(self) -> list[dict[str, Any]]:
        """The tools as templates expect them."""
        return [
            {"type": "function", "function": {**_plain(tool.function), "parameters": _schema(tool.function)}}
            for tool in self.tools
        ]


def _plain(function: Function) -> dict[str, Any]:
    return {"name": function.name, "description": function.description or ""}


def _schema(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def _arguments_schema(function: Function) -> dict[str, Any]:
    """Arguments are an object, whatever the schema leaves open."""
    schema = _schema(function)
    return {**schema, "type": "object"} if "$ref" not in schema else schema

"""How model families write tool calls.

Owns the table of formats, which of them a model uses, and the grammar of calls that a model must make. Must
not know requests or HTTP; `tool_reader` reads the calls back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

ParserName = Literal["auto", "none", "hermes", "qwen", "llama3_json", "mistral"]


class ToolFormat(msgspec.Struct, frozen=True):
    """One family's way.

    begin: what opens a call; empty: calls are the whole output, or it is text. optional: may stand before
    those. opening, between, closing: as the model is made to write several. arguments: the key that holds
    them. id_characters: of a call's id; 0 = OpenAI's form.
    """

    begin: str
    optional: str
    opening: str
    between: str
    closing: str
    arguments: str
    id_characters: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must not be lost where they are special tokens."""
        return tuple(marker for marker in (self.begin, self.optional, *_INNER) if marker)


_INNER = ("[ARGS]", "</tool_call>")
_HERMES = ToolFormat(
    "<tool_call>", "", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "arguments"
)
FORMATS: dict[str, ToolFormat] = {
    # Nous Hermes 2 and 3, Qwen 2.5 and 3, SmolLM2 and 3: a JSON object between tags.
    "hermes": _HERMES,
    "qwen": _HERMES,
    # Llama 3.1 to 3.3: the output is one JSON object, or several with semicolons.
    "llama3_json": ToolFormat("", "<|python_tag|>", "", ";", "", "parameters"),
    # Mistral since 7B v0.3: a JSON list behind a token; since 2411 a name and its arguments behind each.
    "mistral": ToolFormat("[TOOL_CALLS]", "", "[TOOL_CALLS][", ",", "]", "arguments", 9),
}


def choose_format(parser: ParserName, template: str) -> ToolFormat | None:
    """The format of a model: as configured, or by what its chat template says; Hermes' by default."""
    if parser == "none":
        return None
    if parser != "auto":
        return FORMATS[parser]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return FORMATS["llama3_json"]
    return FORMATS["hermes"]


def calls_grammar(
    format_: ToolFormat,
    functions: Sequence[tuple[str, dict[str, Any]]],
    *,
    several: bool,
    added: Callable[[str], int | None],
    instead: str = "",
) -> str:
    """A grammar (Lark, as llguidance extends it) of an output that calls functions.

    functions: name and JSON schema of the arguments. several: more than one call is allowed. added: the id
    of a token that a model's tokenizer was given by hand, None for other text. instead: a JSON schema of an
    output that calls nothing, if that is allowed.
    """

    markers = re.compile("(" + "|".join(map(re.escape, format_.markers)) + ")")

    def literal(text: str) -> str:
        parts = [part for part in markers.split(text) if part]
        return " ".join(json.dumps(part) if added(part) is None else f"<[{added(part)}]>" for part in parts)

    call = "call"
    more = f"({literal(format_.between)} {call})*" if several else ""
    calls = " ".join(
        part for part in (literal(format_.opening), call, more, literal(format_.closing)) if part
    )
    lines = [f"start: calls{' | instead' if instead else ''}", f"calls: {calls}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, (name, schema) in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{format_.arguments}": ')
        lines += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {json.dumps(schema)}"]
    if instead:
        lines.append(f"instead: %json {instead}")
    return "\n".join(lines) + "\n"

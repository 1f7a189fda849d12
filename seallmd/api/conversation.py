"""The messages of a conversation: what clients send of them, and what chat templates expect.

Owns the messages' fields and turning them into plain values, also for templates that know no tools. Must not
know requests, templates' sources or the engine.
"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class ContentPart(msgspec.Struct, frozen=True):
    """A piece of a message; only text can be served."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, frozen=True):
    """arguments: JSON text."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made earlier."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation. tool_call_id: the call that a tool's message answers.

    reasoning_content: what the assistant thought before it said this.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    reasoning_content: str | None = None


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain values, and each content one string."""
    plain = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        entry: dict[str, Any] = {"role": message.role, "content": content or ""}
        optional = {
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content,
        }
        entry |= {key: value for key, value in optional.items() if value is not None}
        if message.tool_calls:
            entry["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
        plain.append(entry)
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments themselves, so they get them as values."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):  # what a model wrote need not be JSON
        arguments = call.function.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


_INSTRUCTION = """You are an expert in composing functions. You are given a question and a set of possible
functions. Based on the question, you may make one or more function calls to achieve the purpose.
If none of the functions can be used, answer the question as usual.

You have access to the following tools:
<tools>{tools}</tools>

For each call write, within tags of its own, a JSON object with the function's name and its arguments:
<tool_call>
{{"name": "function name", "arguments": {{"name of an argument": "its value"}}}}
</tool_call>"""


def explain_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with tools for a template that knows none: in words, in Hermes' way (as SmolLM2 does).

    messages: from `plain_messages`. tools: empty where the conversation only has earlier calls in it.
    """
    told = list[dict[str, Any]]()
    for are_results, group in groupby(messages, key=lambda message: message["role"] == "tool"):
        neighbours = list(group)
        told += [_results(neighbours)] if are_results else [_in_words(message) for message in neighbours]
    if not tools:
        return told
    functions = [tool["function"] for tool in tools]
    text = _INSTRUCTION.format(tools=msgspec.json.encode(functions).decode())
    if told[0]["role"] in ("system", "developer"):
        first = {**told[0], "content": f"{told[0]['content']}\n\n{text}"}
        return [first, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _results(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of one turn's calls as one turn: many templates insist that turns alternate."""
    texts = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in messages]
    return {"role": "user", "content": "\n".join(texts)}


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [f"<tool_call>\n{msgspec.json.encode(call['function']).decode()}\n</tool_call>" for call in calls]
    content = "\n".join([*([message["content"]] if message["content"] else []), *texts])
    return {**{key: message[key] for key in message if key != "tool_calls"}, "content": content}

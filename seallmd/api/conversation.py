"""The messages of a conversation: what clients send of them, and what chat templates expect.

Owns the messages' fields and turning them into plain values. Must not know requests, templates or the engine.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ContentPart(msgspec.Struct, frozen=True):
    """A piece of a message; only text can be served."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain values, and each content one string."""
    plain = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        entry = {"role": message.role, "content": content or ""}
        optional = {"name": message.name, "tool_call_id": message.tool_call_id}
        plain.append({**entry, **{key: value for key, value in optional.items() if value is not None}})
    return plain

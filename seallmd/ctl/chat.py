"""seallmctl chat: a conversation with one service in the terminal.

Owns the conversation. Must not know how answers come over the wire (`ctl.http`).
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any, TextIO

from seallmd.ctl import http

# What a model says must not steer the terminal: no control characters but tabs and line ends.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del _CONTROLS[9], _CONTROLS[10]


class Chat:
    """One conversation: what was said so far is sent along every time."""

    def __init__(self, address: str, service: str, system: str, options: dict[str, Any]) -> None:
        """system: empty = none. options: further fields of the request (max_tokens, temperature)."""
        self._address = address
        self._body = {"model": service, **options, "stream_options": {"include_usage": True}}
        self._messages = [{"role": "system", "content": system}] if system else []

    def say(self, prompt: str, out: TextIO | None) -> dict[str, Any]:
        """Ask, write the answer to `out` as it comes, and return it with its figures.

        What the model thinks before is shown on terminals alone: who pipes wants the answer.
        An answer that was interrupted is forgotten with its question. Raises Unreachable or ControlError.
        """
        messages = [*self._messages, {"role": "user", "content": prompt}]
        answer: dict[str, Any] = {
            "content": "",
            "reasoning_content": "",
            "finish_reason": None,
            "usage": None,
        }
        with contextlib.closing(
            http.stream(self._address, "/v1/chat/completions", {**self._body, "messages": messages})
        ) as chunks:
            for chunk in chunks:
                answer["usage"] = chunk.get("usage") or answer["usage"]
                for choice in chunk["choices"]:
                    if out is not None:
                        out.write(_shown(choice["delta"], answer, out.isatty()).translate(_CONTROLS))
                        out.flush()
                    for name in ("content", "reasoning_content"):
                        answer[name] += choice["delta"].get(name) or ""
                    answer["finish_reason"] = choice["finish_reason"] or answer["finish_reason"]
        self._messages = [*messages, {"role": "assistant", "content": answer["content"]}]
        return answer


def _shown(delta: dict[str, Any], before: dict[str, Any], terminal: bool) -> str:
    """What is written of a piece. before: the answer so far."""
    text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
    if not terminal:
        return text
    if thought and not before["reasoning_content"]:
        thought = f"(thinking) {thought}"
    ends = text and before["reasoning_content"] and not before["content"]
    return thought + ("\n\n" if ends else "") + text


def once(chat: Chat, prompt: str, *, as_json: bool) -> None:
    """One question, one answer on stdout. Raises Unreachable or ControlError."""
    answer = chat.say(prompt, None if as_json else sys.stdout)
    print(json.dumps(answer) if as_json else "")


def converse(chat: Chat) -> None:
    """Lines from the terminal until Ctrl-D; Ctrl-C ends an answer. Raises Unreachable or ControlError."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives input() history and editing
    print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt.strip():
            continue
        try:
            chat.say(prompt, sys.stdout)
        except KeyboardInterrupt:
            print(" (interrupted)", end="")
        print()

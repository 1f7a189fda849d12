"""What clients of /v1/responses get.

Owns its objects and the order of its events. Must not know aiohttp, or where pieces come from.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from msgspec import UnsetType

from seallmd.api.choices import Choice, Piece
from seallmd.api.responses import Usage, count_usage
from seallmd.api.responses_schema import ResponsesRequest
from seallmd.api.tiers import tier_of
from seallmd.api.tool_reader import Called, Said
from seallmd.api.turns import Thought, TurnEvent, TurnFormat, Turns

Object = dict[str, Any]


class ResponsesAnswer:
    """`responses.Answer` of /v1/responses. There is one choice; its turn becomes a list of items."""

    def __init__(self, request: ResponsesRequest, turn: TurnFormat) -> None:
        self._request = request
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._turns = Turns(turn)
        self._items: list[Object] = []  # the last one may be open
        self._sent = 0
        self._begun = False
        self._tier = tier_of(request.service_tier)

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[Object]:  # noqa: ARG002 - it comes at the end
        """The events for one piece."""
        events = [] if self._begun else self._begin()
        for event in self._turns.events(piece):
            events += self._take(event)
        if piece.finish_reason is not None:
            events += self._close(cut=piece.finish_reason == "length")
            response = self._response(piece.finish_reason, count_usage([choice], 1))
            events.append(self._event(f"response.{response['status']}", response=response))
        return events

    def usage_chunk(self, usage: Usage) -> None:
        """There is none: the last event has it."""

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> Object:  # noqa: ARG002 - one choice
        """The response."""
        for event in self._turns.events(pieces[0]):
            self._take(event)
        self._close(cut=pieces[0].finish_reason == "length")
        return self._response(pieces[0].finish_reason, usage)

    # ------------------------------------------------------------------------------------------- events

    def _event(self, kind: str, **fields: object) -> Object:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}

    def _begin(self) -> list[Object]:
        self._begun = True
        response = self._response(None, None)
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def _take(self, event: TurnEvent) -> list[Object]:
        if isinstance(event, Said):
            return self._write("message", event.text)
        if isinstance(event, Thought):
            return self._write("reasoning", event.text)
        if isinstance(event, Called):
            item = {
                "type": "function_call",
                "id": f"fc_{uuid.uuid4().hex}",
                "call_id": event.id,
                "name": event.name,
                "arguments": "",
            }
            return [*self._close(), *self._open(item)]
        self._items[-1]["arguments"] += event.text
        return [self._event("response.function_call_arguments.delta", **self._place(), delta=event.text)]

    def _write(self, kind: str, text: str) -> list[Object]:
        """More text of a message, or of thoughts."""
        events = [] if self._is_open(kind) else self._open_text(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        delta = self._event(
            f"response.{part['type']}.delta", **self._place(), content_index=0, delta=text, **_scores(part)
        )
        return [*events, delta]

    def _open_text(self, kind: str) -> list[Object]:
        part: Object
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            item = {"type": kind, "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "content": [part]}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"type": kind, "id": f"rs_{uuid.uuid4().hex}", "summary": [], "content": [part]}
        events = [*self._close(), *self._open(item)]
        shown = part.copy()
        return [
            *events,
            self._event("response.content_part.added", **self._place(), content_index=0, part=shown),
        ]

    def _open(self, item: Object) -> list[Object]:
        self._items.append({**item, "status": "in_progress"})
        shown = {**self._items[-1], **({"content": []} if "content" in item else {})}
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)]

    def _close(self, *, cut: bool = False) -> list[Object]:
        """End the item that is open, if one is. cut: it is not complete."""
        if self._is_open("message") or self._is_open("reasoning"):
            part = self._items[-1]["content"][0]
            where = {**self._place(), "content_index": 0}
            events = [
                self._event(f"response.{part['type']}.done", **where, text=part["text"], **_scores(part)),
                self._event("response.content_part.done", **where, part=part),
            ]
        elif self._is_open("function_call"):
            told = {"name": self._items[-1]["name"], "arguments": self._items[-1]["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._place(), **told)]
        else:
            return []
        self._items[-1]["status"] = "incomplete" if cut else "completed"
        index = len(self._items) - 1
        return [
            *events,
            self._event("response.output_item.done", output_index=index, item=self._items[-1]),
        ]

    def _is_open(self, kind: str) -> bool:
        last = self._items[-1] if self._items else {"type": ""}
        return bool(last["type"] == kind and last["status"] == "in_progress")

    def _place(self) -> Object:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    # ----------------------------------------------------------------------------------------- the whole

    def _response(self, reason: str | None, usage: Usage | None) -> Object:
        """reason: why the output ended, None while it goes on."""
        request = self._request
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": list(self._items) if reason is not None else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "service_tier": self._tier,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": _format(request)},
            "tool_choice": request.tool_choice or "auto",
            "tools": [{**msgspec.structs.asdict(tool), "type": "function"} for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage, self._turns.reasoning_tokens or 0),
        }


def _format(request: ResponsesRequest) -> Object:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return msgspec.structs.asdict(wanted)


def _scores(part: Object) -> Object:
    """Events of a message's text have log-probabilities; there are none."""
    return {"logprobs": []} if part["type"] == "output_text" else {}


def _usage(usage: Usage, reasoning: int) -> Object:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage.total_tokens,
    }

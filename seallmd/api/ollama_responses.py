"""What Ollama's clients get: the objects of /api/generate, /api/chat, /api/tags, /api/ps and /api/show.

Owns their fields. Must not know aiohttp, or where pieces come from.
"""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from msgspec import UnsetType

from seallmd.api.choices import Choice, Piece
from seallmd.api.responses import Usage
from seallmd.api.tool_reader import Argued, Called, Said
from seallmd.api.turns import TurnFormat, Turns
from seallmd.core.status import ServiceStatus
from seallmd.runtime.face import ServiceView

_NEVER = "9999-12-31T23:59:59Z"
_LEVELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}


class Ended(msgspec.Struct, frozen=True):
    """Why an answer is over, and what it took. Durations are nanoseconds."""

    done_reason: str
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class OllamaAnswer:
    """`responses.Answer` of both endpoints. Each piece is an object; the last one is `done`, with figures."""

    def __init__(self, model: str, kind: Literal["generate", "chat"], turn: TurnFormat | None = None) -> None:
        """turn: how the output is written; None: it is text."""
        self._model = model
        self._kind = kind
        self._turns = Turns(turn or TurnFormat())
        self._call: _Call | None = None  # the one that is being written

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[object]:  # noqa: ARG002 - Ollama has no usage
        """What there is to tell, if there is something; at the end an object without text."""
        parts = self._parts(piece)
        chunks = [self._body(part) for part in parts]
        if piece.finish_reason is not None:
            chunks.append(self._body(_Part(), _ended(choice, piece.finish_reason)))
        return chunks

    def usage_chunk(self, usage: Usage) -> None:
        """There is none: the last object has the figures."""

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> object:  # noqa: ARG002 - Ollama has no usage
        """One object with all."""
        parts = self._parts(pieces[0])
        whole = _Part(
            "".join(part.text for part in parts),
            "".join(part.thinking for part in parts),
            [call for part in parts for call in part.calls],
        )
        return self._body(whole, _ended(choices[0], pieces[0].finish_reason or "stop"))

    def nothing(self, reason: str) -> object:
        """The answer when a model was only loaded or unloaded."""
        return self._body(_Part(), Ended(reason))

    def _parts(self, piece: Piece) -> list[_Part]:
        """A call is told when it is whole: behind it something else begins, or nothing follows."""
        parts = list[_Part]()
        for event in self._turns.events(piece):
            if isinstance(event, Argued):
                assert self._call is not None
                self._call.arguments += event.text
                continue
            parts += self._close()
            if isinstance(event, Called):
                self._call = _Call(event)
            else:
                parts.append(_Part(event.text) if isinstance(event, Said) else _Part(thinking=event.text))
        return parts if piece.finish_reason is None else [*parts, *self._close()]

    def _close(self) -> list[_Part]:
        call, self._call = self._call, None
        return [] if call is None else [call.told()]

    def _body(self, part: _Part, ended: Ended | None = None) -> object:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        thinking = {"thinking": part.thinking} if part.thinking else {}
        if self._kind == "chat":
            calls = {"tool_calls": part.calls} if part.calls else {}
            message = {"role": "assistant", "content": part.text, **thinking, **calls}
            body: dict[str, Any] = {"message": message}
        else:
            body = {"response": part.text, **thinking}
        figures = {} if ended is None else msgspec.structs.asdict(ended)
        return {"model": self._model, "created_at": now, **body, "done": ended is not None, **figures}


class _Part(msgspec.Struct, frozen=True):
    """Something to tell. calls: as Ollama has them."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = []


class _Call:
    """A call that is being written. arguments: the JSON text so far."""

    def __init__(self, begun: Called) -> None:
        self._begun = begun
        self.arguments = ""

    def told(self) -> _Part:
        """The call; or as text what was cut off: nobody must make it, and it has no arguments as values."""
        try:
            arguments = msgspec.json.decode(self.arguments, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            name = msgspec.json.encode(self._begun.name).decode()
            return _Part(f'{{"name": {name}, "arguments": {self.arguments}')
        function = {"index": self._begun.index, "name": self._begun.name, "arguments": arguments}
        return _Part(calls=[{"id": self._begun.id, "function": function}])


def _ended(choice: Choice, reason: str) -> Ended:
    now = time.monotonic()
    first = now if choice.first_token is None else choice.first_token
    return Ended(
        done_reason=reason,
        total_duration=_nanoseconds(now - choice.began),
        prompt_eval_count=len(choice.prompt),
        prompt_eval_duration=_nanoseconds(first - choice.began),
        eval_count=choice.tokens,
        eval_duration=_nanoseconds(now - first),
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def model_card(view: ServiceView) -> dict[str, Any]:
    """A service in /api/tags. digest: of its name and configuration, not of its weights."""
    settings, shape = view.settings, view.shape
    identity = f"{settings.name}\0{settings.model}\0{settings.dtype}"
    family = shape.architecture if shape else ""
    return {
        "name": settings.name,
        "model": settings.name,
        "modified_at": datetime.fromtimestamp(view.created, UTC).isoformat().replace("+00:00", "Z"),
        "size": shape.weights_bytes if shape else 0,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "gguf" if settings.model.endswith(".gguf") else "safetensors",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": _parameters(shape.weights_bytes / shape.bytes_per_weight) if shape else "",
            "quantization_level": _LEVELS.get(shape.dtype, shape.dtype) if shape else "",
        },
    }


def running_card(view: ServiceView, status: ServiceStatus) -> dict[str, Any]:
    """A resident service in /api/ps."""
    card = model_card(view)
    del card["modified_at"]
    size = status.weights_bytes * max(1, len(status.groups)) + status.kv_bytes
    return {
        **card,
        "size": size,
        "size_vram": size,
        "expires_at": _expiry(status),
        "context_length": status.context,
    }


def shown_card(view: ServiceView, template: str, capabilities: list[str]) -> dict[str, Any]:
    """A service in /api/show. template: as the model has it (Jinja, where Ollama's are Go's)."""
    card, shape = model_card(view), view.shape
    assert shape is not None
    family = shape.architecture
    return {
        "modified_at": card["modified_at"],
        "template": template,
        "details": card["details"],
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": round(shape.weights_bytes / shape.bytes_per_weight),
            f"{family}.context_length": shape.context,
            f"{family}.embedding_length": shape.hidden,
            f"{family}.block_count": len(shape.layers),
            f"{family}.vocab_size": shape.vocab,
        },
        "capabilities": capabilities,
    }


def _expiry(status: ServiceStatus) -> str:
    if status.expires_seconds is None:
        return _NEVER
    expiry = datetime.now(UTC) + timedelta(seconds=status.expires_seconds)
    return expiry.isoformat().replace("+00:00", "Z")


def _parameters(count: float) -> str:
    """134515008 -> "134.5M"."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

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

    def __init__(self, model: str, kind: Literal["generate", "chat"]) -> None:
        self._model = model
        self._kind = kind

    def chunks(self, choice: Choice, piece: Piece, usage: Usage | UnsetType | None) -> list[object]:  # noqa: ARG002 - Ollama has no usage
        """The text, if there is some; at the end an object without text."""
        chunks = [self._body(piece.text)] if piece.text else []
        if piece.finish_reason is not None:
            chunks.append(self._body("", _ended(choice, piece.finish_reason)))
        return chunks

    def usage_chunk(self, usage: Usage) -> None:
        """There is none: the last object has the figures."""

    def whole(self, choices: list[Choice], pieces: list[Piece], usage: Usage) -> object:  # noqa: ARG002 - Ollama has no usage
        """One object with all."""
        return self._body(pieces[0].text, _ended(choices[0], pieces[0].finish_reason or "stop"))

    def nothing(self, reason: str) -> object:
        """The answer when a model was only loaded or unloaded."""
        return self._body("", Ended(reason))

    def _body(self, text: str, ended: Ended | None = None) -> object:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        if self._kind == "chat":
            body: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        else:
            body = {"response": text}
        figures = {} if ended is None else msgspec.structs.asdict(ended)
        return {"model": self._model, "created_at": now, **body, "done": ended is not None, **figures}


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


def shown_card(view: ServiceView, template: str) -> dict[str, Any]:
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
        "capabilities": ["completion"] + ["embedding"] * (view.settings.pooling != "none"),
    }


def _expiry(status: ServiceStatus) -> str:
    if status.expires_seconds is None:
        return _NEVER
    expiry = datetime.now(UTC) + timedelta(seconds=status.expires_seconds)
    return expiry.isoformat().replace("+00:00", "Z")


def _parameters(count: float) -> str:
    """134515008 -> "134.5M"."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

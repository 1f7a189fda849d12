"""Chat templates: which one a model has, and rendering it without risk to the daemon.

Owns what is asked of the template process (`template_process` says why it is one). Must not know requests or
HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from seallmd.api.helper import HelperFailed, HelperProcess
from seallmd.api.reasoning import knows_reasoning
from seallmd.api.template_process import MAX_RENDERED_CHARACTERS, Job, Rendered
from seallmd.errors import RequestError

RENDER_SECONDS = 10.0
_LINE_BYTES = 6 * MAX_RENDERED_CHARACTERS + 1024  # JSON needs at most six bytes for a character
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate(msgspec.Struct, frozen=True):
    """A model's template, and the special tokens that it may name (bos_token, eos_token, ...)."""

    source: str
    special_tokens: dict[str, str]

    @property
    def knows_developer(self) -> bool:
        """Whether the role `developer` means something to the template; otherwise it is a system message."""
        return "developer" in self.source

    @property
    def knows_tools(self) -> bool:
        """Whether the template tells the model of tools; otherwise somebody else has to."""
        return "tools" in self.source

    @property
    def knows_reasoning(self) -> bool:
        """Whether the model is one that thinks before it answers."""
        return knows_reasoning(self.source)

    @property
    def takes_reasoning(self) -> bool:
        """Whether the template tells the model of what it thought in earlier turns."""
        return "reasoning_content" in self.source


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The model's chat template from where transformers keeps it; None when it has none.

    A file of its own wins over tokenizer_config.json. Of several named templates, "default" is taken. Raises
    OSError or msgspec.DecodeError when a file is there but cannot be read.
    """
    config = {
        **_read_json(directory / "special_tokens_map.json"),
        **_read_json(directory / "tokenizer_config.json"),
    }
    source = _read_source(directory, config)
    if not source:
        return None
    special = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in special.items() if text is not None})


def _read_source(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    alone = _read_json(directory / "chat_template.json").get("chat_template")
    return _default_template(alone if alone is not None else config.get("chat_template"))


def _read_json(path: Path) -> dict[str, Any]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}


def _default_template(value: object) -> str | None:
    """Either the template, or a list of {"name", "template"}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    named = {entry["name"]: entry["template"] for entry in value}
    template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _token_text(value: object) -> str | None:
    """A special token: its text, or a description of an AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class TemplateRenderer:
    """Renders templates, one at a time, in a process of their own."""

    def __init__(self, seconds: float = RENDER_SECONDS) -> None:
        """seconds: limit of one rendering; a template that takes longer is killed."""
        module = "seallmd.api.template_process"
        self.helper = HelperProcess(module, Rendered, seconds=seconds, line_bytes=_LINE_BYTES)

    async def render(self, template: ChatTemplate, variables: dict[str, Any]) -> str:
        """The text of a chat. Raises RequestError when the template refuses them or takes too long."""
        try:
            answer = await self.helper.ask(Job(template.source, {**template.special_tokens, **variables}))
        except TimeoutError:
            message = "the model's chat template takes too long on these messages"
            raise RequestError(message, param="messages") from None
        except HelperFailed:
            message = "the chat template process ended"
            raise RequestError(message, status=500, code="template_failed") from None
        if answer.error:
            raise RequestError(
                f"the model's chat template refuses these messages: {answer.error}", param="messages"
            )
        return answer.text

    async def close(self) -> None:
        """End the process."""
        await self.helper.close()

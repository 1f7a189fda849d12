"""The way of a chat, whichever API it came by: from its fields to what is asked of the model.

Owns what a conversation, its tools and the model's template come to: a prompt, and how the turn that follows
is written. Must not know the bodies and responses of particular APIs, nor aiohttp.
"""

from __future__ import annotations

from typing import Any

import msgspec

from seallmd.api.conversation import plain_messages
from seallmd.api.limits import truncated
from seallmd.api.reasoning import BEGIN, END, leaves_open, thoughts_grammar
from seallmd.api.schema import ChatRequest
from seallmd.api.serving import Model, Serving, Turn
from seallmd.api.text import TextModel
from seallmd.api.turns import TurnFormat
from seallmd.core.settings import ServiceSettings


class Chat(msgspec.Struct, frozen=True):
    """A conversation that is ready to go on."""

    model: Model
    prompt: list[int]
    turn: Turn


async def prepare(serving: Serving, spec: ChatRequest) -> Chat:
    """The next turn of a conversation. Raises RequestError."""
    model = await serving.model(spec.model)
    settings = serving.view(spec.model).settings
    tools, format_, form, shown = spec.offered, None, None, list[dict[str, Any]]()
    if tools is None:
        form = spec.form
    else:
        format_ = tools.format(model.text, settings.tool_parser)
        form = tools.form(format_, model.text, spec.form)
        shown = tools.shown()
    prompt = await serving.texts.encode_chat(
        model.text,
        plain_messages(spec.messages),
        spec.chat_template_kwargs or {},
        tools=shown,
        add_generation_prompt=spec.add_generation_prompt is not False,
        add_special_tokens=bool(spec.add_special_tokens),
        continue_final=bool(spec.continue_final_message),
    )
    prompt = truncated(spec, model.shape.context, prompt)
    reasons = reads_reasoning(settings, model.text)
    is_open = reasons and _is_open(spec, model.text, prompt)
    if form is not None:
        reasons = is_open or (reasons and not _is_over(spec, model.text, prompt))
        if reasons:
            before = thoughts_grammar(model.text.added_id, is_open=is_open)
            form = msgspec.structs.replace(form, before=before)
    written = TurnFormat(
        tools=format_,
        several=spec.parallel_tool_calls is not False,
        reasons=reasons,
        is_open=is_open,
    )
    return Chat(model, prompt, Turn(written, form))


def reads_reasoning(settings: ServiceSettings, model: TextModel) -> bool:
    """Whether thoughts are told apart from answers."""
    knows = model.template is not None and model.template.knows_reasoning
    return knows and settings.reasoning_parser != "none"


def _is_open(spec: ChatRequest, model: TextModel, prompt: list[int]) -> bool:
    """Whether the model goes on in thoughts: its template has begun them, or the turn that is continued."""
    if spec.continue_final_message:
        return leaves_open(str(plain_messages(spec.messages[-1:])[0]["content"]))
    return model.ends_with(prompt, BEGIN)


def _is_over(spec: ChatRequest, model: TextModel, prompt: list[int]) -> bool:
    """Whether the answer has begun, or the template has closed the thoughts, as it does to turn them off."""
    return bool(spec.continue_final_message) or model.ends_with(prompt, END)

"""Chat templates: found where transformers keeps them, rendered alike, and harmless when hostile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from seallmd.api.template_process import Job, render
from seallmd.api.templates import ChatTemplate, TemplateRenderer, read_chat_template
from seallmd.api.text import TextModel, TextModels
from seallmd.errors import RequestError
from tests.api.engine_double import TEMPLATE, write_model

MESSAGES = [{"role": "user", "content": "a<b> \u2028 é"}, {"role": "assistant", "content": "c"}]
TRICKY = """
{%- for m in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% if m.role == 'assistant' %}
A: {% generation %}{{ m.content | trim }}{% endgeneration %}
    {% else %}
U: {{ m | tojson }} {{ strftime_now("") }}
    {% endif %}
{% endfor %}
{{ bos_token }}{{ add_generation_prompt }}{{ missing is defined }}
"""


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer(seconds=20)
    yield renderer
    await renderer.close()


def variables(**more: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", **more}


def test_same_as_transformers() -> None:
    """White space control, loop controls, JSON without HTML escapes: models were trained on exactly that."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=TRICKY, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(Job(TRICKY, variables())).text == expected[0]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "list object has no element 9"),
        ("{% for %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_bad_templates_are_answers(template: str, error: str) -> None:
    """What a template does wrong is told in a line; the sandbox keeps it from the interpreter."""
    answer = render(Job(template, variables()))
    assert error in answer.error
    assert answer.text == ""
    assert "\n" not in answer.error
    assert len(answer.error) <= 300


def test_output_is_bounded() -> None:
    """A loop that writes is stopped by size."""
    template = "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}"
    assert "too long" in render(Job(template, {})).error


async def test_endless_template_is_killed() -> None:
    """A template without end hurts its own request alone: the next one finds a fresh process."""
    renderer = TemplateRenderer(seconds=0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="takes too long"):
        await renderer.render(ChatTemplate(endless, {}), {})
    renderer.helper.seconds = 20
    assert await renderer.render(ChatTemplate("{{ x }}", {}), {"x": "fine"}) == "fine"
    await renderer.close()


async def test_memory_is_bounded(renderer: TemplateRenderer) -> None:
    """A template that asks for gigabytes gets an error from a process that lives on."""
    with pytest.raises(RequestError, match="memory"):
        await renderer.render(ChatTemplate("{{ ('x' * 3000000000) | length }}", {}), {})
    assert await renderer.render(ChatTemplate("{{ x }}", {}), {"x": "fine"}) == "fine"


async def test_process_that_dies(renderer: TemplateRenderer) -> None:
    """Whoever kills the process between two requests costs none of them, in the middle of one that one."""
    assert await renderer.render(ChatTemplate("a", {}), {}) == "a"
    assert renderer.helper.process is not None
    renderer.helper.process.kill()
    await renderer.helper.process.wait()
    assert await renderer.render(ChatTemplate("a", {}), {}) == "a"
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    job = asyncio.create_task(renderer.render(ChatTemplate(endless, {}), {}))
    await asyncio.sleep(0)
    renderer.helper.process.kill()
    with pytest.raises(RequestError) as caught:
        await job
    assert caught.value.status == 500
    assert await renderer.render(ChatTemplate("a", {}), {}) == "a"


def test_where_templates_are_found(tmp_path: Path) -> None:
    """A file of its own wins over the tokenizer's configuration; of named templates "default" is taken."""
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config = {"bos_token": {"content": "<b>"}, "eos_token": None, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<p>", "bos_token": "old"}))
    assert read_chat_template(tmp_path) == ChatTemplate("D", {"bos_token": "<b>", "pad_token": "<p>"})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.source == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.source == "F"


async def test_text_models(tmp_path: Path) -> None:
    """A broken model is an error each time it is asked for, and loads once it is repaired."""
    models = TextModels()
    with pytest.raises(RequestError, match="tokenizer cannot be read") as caught:
        await models.get(str(tmp_path))
    assert caught.value.status == 503
    assert str(tmp_path) not in str(caught.value)
    tokenizer = write_model(tmp_path, template=None)
    model = await models.get(str(tmp_path))
    assert await models.get(str(tmp_path)) is model
    assert await models.encode(model, "hello", add_special_tokens=True) == tokenizer.encode("hello").ids
    with pytest.raises(RequestError, match="no chat template"):
        await models.encode_chat(model, MESSAGES, {})
    await models.close()


async def test_developer_role_that_the_template_knows(tmp_path: Path) -> None:
    """Only a template that does not know the role gets a system message instead."""
    tokenizer = write_model(tmp_path)
    models = TextModels()
    for source, role in ((TEMPLATE, "system"), (TEMPLATE + "{# developer #}", "developer")):
        model = TextModel(tokenizer, ChatTemplate(source, {"bos_token": "<s>"}))
        ids = await models.encode_chat(model, [{"role": "developer", "content": "x"}], {})
        assert tokenizer.decode(ids) == f"<{role}>x\n<assistant>"
    await models.close()

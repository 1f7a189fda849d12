"""Real clients against the daemon with real models: what their users do works, and the texts are right.

The scripts hold the clients to what they promise; here their texts and vectors are compared with each other
and with transformers', so that no client gets something else.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.e2e.clients.conftest import OURS, Run
from tests.e2e.conftest import prompts
from tests.e2e.daemon import GEMMA, MODELS, SMOL, Daemon

Reference = dict[str, list[list[int]]]
PROMPT = "Once upon a time"  # one of the reference's
TOKENS = 12


@pytest.fixture
def texts(reference: Reference) -> dict[str, str]:
    """The greedy completion of PROMPT by model, from transformers."""
    at = prompts().index(PROMPT)
    return {
        name: AutoTokenizer.from_pretrained(MODELS / name).decode(found[at][:TOKENS])
        for name, found in reference.items()
    }


@pytest.fixture
def chat(daemon: Daemon) -> str:
    """What the model answers to the scripts' question."""
    answer = daemon.client().chat.completions.create(
        model=SMOL,
        messages=[{"role": "user", "content": "Name a colour."}],
        temperature=0,
        max_tokens=TOKENS,
    )
    return answer.choices[0].message.content or ""


@pytest.fixture
def vector(daemon: Daemon) -> Any:
    """The beginning of PROMPT's embedding."""
    answer = daemon.client().embeddings.create(model=SMOL, input=PROMPT)
    return pytest.approx(np.asarray(answer.data[0].embedding[:8]), abs=1e-5)


@pytest.mark.parametrize(("environment", "line"), [(OURS, "3."), ("openai-1", "1."), ("others", "2.")])
def test_openai(
    client: Run, texts: dict[str, str], chat: str, vector: Any, environment: str, line: str
) -> None:
    """Every line of the official client: completions, chats, streams, schemas, tools, responses, embeddings,
    errors, and several requests at once."""
    found = json.loads(client(environment, "with_openai.py"))
    assert found["version"].startswith(line)
    assert (found["completion"], found["chat"], found["response"]) == (texts[SMOL], chat, chat)
    assert found["embedding"] == vector


def test_litellm(client: Run, texts: dict[str, str], chat: str, vector: Any) -> None:
    """As a server of OpenAI's kind, of vLLM's and of Ollama's; its exceptions are the specific ones."""
    found = json.loads(client("others", "with_litellm.py"))
    assert found["chats"] == dict.fromkeys(("openai", "hosted_vllm", "ollama_chat"), chat)
    assert found["completion"] == texts[GEMMA]
    assert set(found["embeddings"]) == {"openai", "hosted_vllm", "ollama"}
    assert all(value == vector for value in found["embeddings"].values())


def test_langchain(client: Run, texts: dict[str, str], chat: str, vector: Any) -> None:
    """Chains, batches, streams, structured output in both ways, tools, embeddings."""
    found = json.loads(client("others", "with_langchain.py"))
    assert (found["chat"], found["completion"], found["embedding"]) == (chat, texts[GEMMA], vector)


def test_ollama(client: Run, texts: dict[str, str], chat: str, vector: Any) -> None:
    """Lists, chats, streams, schemas, raw prompts, embeddings, errors."""
    found = json.loads(client("others", "with_ollama.py"))
    assert (found["chat"], found["completion"], found["raw"]) == (chat, texts[GEMMA], texts[SMOL])
    assert found["embedding"] == vector

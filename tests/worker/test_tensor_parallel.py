"""One model on several devices: what the ranks compute together is what one device computes."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import group
from seallmd.worker.parallel import Indivisible, divide
from seallmd.worker.probe import probe
from tests.worker.helpers import VOCABULARY, plain, save_tiny
from tests.worker.ranks import Ranks

# Families with a plan, by what their layers store on one of two ranks.
DIVIDED = {
    "llama": 1,
    "llama tied": 1,
    "qwen2": 1,
    "qwen3": 1,
    "gemma2": 1,
    "gemma3_text": 1,
    "mistral": 1,
    "phi3": 2,  # its plan gathers the packed projection: attention is the same on all ranks
    "mixtral": 1,
    "qwen3_moe": 1,
    "deepseek_v3": 4,  # its plan divides experts and MLPs alone
}


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, VOCABULARY - 1), k=length)


@pytest.fixture(params=["torch", "compiled"])
def two(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ranks:
    """Everything is to hold with the compiled operations and without."""
    if request.param == "compiled":
        request.getfixturevalue("native")
    return Ranks(monkeypatch, tmp_path, 2)


@pytest.mark.parametrize("family", DIVIDED)
def test_equals_plain_forward(
    family: str, two: Ranks, tmp_path: Path, record_property: pytest.Function
) -> None:
    """Chunked prefill, mixed batches and decodes over two ranks give the plain model's logits and tokens."""
    directory = save_tiny(tmp_path / "m", family, vocab_size=VOCABULARY - 1)
    model = plain(directory)
    two.load("s", directory)
    assert two.rigs[1].shapes["s"].layers[0].kv_heads == DIVIDED[family]
    a, b, c = (two.talks(i, "s", prompt(n)) for i, n in enumerate((23, 5, 41)))
    two.step(model, [(a, 9), (b, 5)])
    two.step(model, [(c, 30)])  # nobody draws
    two.step(model, [(a, 14), (b, 1)])
    two.step(model, [(b, 1), (c, 11), (a, 1)])
    for _ in range(3):
        two.step(model, [(a, 1), (b, 1), (c, 1)])
    record_property("largest", two.largest)
    print(family, two.largest)

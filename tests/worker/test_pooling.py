"""Pooled hidden states against transformers': in chunks, beside generating neighbours, after restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from seallmd.core import messages as msg
from tests.worker.helpers import GREEDY, Rig, plain, plain_logits, save_tiny

PROMPT = list(range(3, 15))


def admit(pooling: Literal["mean", "last"], told: int = 0) -> msg.Admit:
    sampling = msg.Sampling(pooling=pooling)
    return msg.Admit(1, tuple(PROMPT), len(PROMPT), sampling, told)


@torch.inference_mode()
def hidden_states(model: torch.nn.Module) -> np.ndarray:
    """[tokens, hidden size] behind the final norm, as transformers tells them."""
    found = model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1]
    return found[0].numpy()


def vector(part: msg.Pooled) -> np.ndarray:
    return np.frombuffer(part.sum, "<f4")


@pytest.mark.parametrize("family", ["llama tied", "gemma3_text", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_in_chunks_beside_others(
    family: str, pooling: Literal["mean", "last"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of three rows, and a neighbour that generates in the same steps and is none the worse."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m", family))
    model = plain(tmp_path / "m")
    talk, table, run, found = [9, 9], 0, 0, list[msg.Pooled]()
    admits = [msg.Admit(2, tuple(talk), 2, GREEDY), admit(pooling)]
    for index, count in enumerate([5, 6, 1]):
        blocks = rig.blocks("s", table, run + count)
        table += len(blocks)
        fresh = 2 if index == 0 else 1
        start = len(talk) - fresh
        other = rig.blocks("s", 1, len(talk)) if index else rig.blocks("s", 0, len(talk))
        rows = [msg.Row(2, start, fresh, True, other), msg.Row(1, run, count, False, blocks)]
        done = rig.step("s", admits, rows)
        assert done.tokens == (int(plain_logits(model, talk).argmax()),)
        talk += done.tokens
        found += done.pooled
        admits, run = [], run + count
    expected = hidden_states(model)
    if pooling == "mean":
        assert [(part.position, part.tokens) for part in found] == [(0, 5), (5, 6), (11, 1)]
        wanted = [expected[:5].sum(0), expected[5:11].sum(0), expected[11]]
    else:
        assert [(part.position, part.tokens) for part in found] == [(11, 1)]
        wanted = [expected[11]]
    for part, values in zip(found, wanted, strict=True):
        assert part.request == 1
        assert vector(part) == pytest.approx(values, abs=2e-4)


def test_what_is_told_is_not_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted request that comes back with part of its prompt pooled gets the rest."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"))
    done = rig.step("s", [admit("mean", told=6)], [msg.Row(1, 0, 12, False, rig.blocks("s", 0, 12))])
    (part,) = done.pooled
    assert (part.position, part.tokens) == (6, 6)
    assert vector(part) == pytest.approx(hidden_states(plain(tmp_path / "m"))[6:].sum(0), abs=2e-4)


def test_a_step_that_only_pools_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, and a request that is over as far as the worker goes."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"))
    done = rig.step("s", [admit("last")], [msg.Row(1, 0, 12, False, rig.blocks("s", 0, 12))])
    assert isinstance(done, msg.StepDone)
    assert (done.tokens, done.scores, len(done.pooled)) == ((), (), 1)

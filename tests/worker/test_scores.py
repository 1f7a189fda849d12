"""Log-probabilities against those of transformers: drawn tokens and prompts, in chunks, after restarts."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import scores as scores_module
from tests.worker.helpers import VOCABULARY, Rig, plain, save_tiny

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def asking(**fields: int) -> msg.Sampling:
    return msg.Sampling(temperature=0.0, **fields)


def unpack(scores: msg.Scores) -> list[tuple[int, list[int], list[float], int]]:
    """(position, ids, log-probabilities, rank) of each token."""
    width, tokens = 1 + scores.top, scores.tokens
    ids = struct.unpack(f"<{width * tokens}i", scores.ids)
    values = struct.unpack(f"<{width * tokens}f", scores.logprobs)
    ranks = struct.unpack(f"<{tokens}i", scores.ranks)
    return [
        (
            scores.position + i,
            list(ids[i * width :][:width]),
            list(values[i * width :][:width]),
            ranks[i],
        )
        for i in range(tokens)
    ]


@torch.inference_mode()
def check(model: torch.nn.Module, tokens: list[int], found: list[msg.Scores], top: int) -> list[int]:
    """Every score is the plain model's; returns the positions."""
    reference = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].float(), -1)
    positions = []
    for position, ids, values, rank in (entry for scores in found for entry in unpack(scores)):
        row = reference[position - 1]
        assert ids[0] == tokens[position]
        assert len(ids) == 1 + top
        assert values == pytest.approx(row[ids].tolist(), abs=1e-4)
        assert sorted(values[1:], reverse=True) == values[1:]
        assert values[1:] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert rank == pytest.approx(int((row > row[ids[0]]).sum()) + 1, abs=1)
        positions.append(position)
    return positions


@pytest.mark.parametrize("family", ["llama tied", "gemma2", "gpt2", "mixtral"])
def test_prompt_and_output(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of the prompt and chunks of rows, beside a neighbour that wants none; soft cap included."""
    monkeypatch.setattr(scores_module, "_CHUNK_BYTES", 4 * VOCABULARY * 2)  # two rows at a time
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m", family))
    model = plain(tmp_path / "m")
    tokens, table, run, found = list(PROMPT), 0, 0, []
    admits = [
        msg.Admit(1, tuple(tokens), len(PROMPT), asking(logprobs=3, prompt_logprobs=3)),
        msg.Admit(2, (9, 9), 2, asking()),
    ]
    for index, count in enumerate([5, 6, 1, 1, 1]):
        blocks = rig.blocks("s", table, run + count)
        table += len(blocks)
        rows = [msg.Row(1, run, count, run + count == len(tokens), blocks)]
        if index == 0:
            rows.insert(0, msg.Row(2, 0, 2, True, rig.blocks("s", 0, 2)))
        done = rig.step("s", admits, rows)
        assert all(scores.request == 1 for scores in done.scores)
        found += done.scores
        admits, run = [], run + count
        if rows[-1].sample:
            tokens.append(done.tokens[-1])
    assert check(model, tokens, found, 3) == list(range(1, len(tokens)))


def test_what_is_scored_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted request that comes back with part of its scores told gets the rest, and each once."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"))
    wanted = asking(prompt_logprobs=0)
    first = rig.step(
        "s", [msg.Admit(1, tuple(PROMPT), 12, wanted)], [msg.Row(1, 0, 5, False, rig.blocks("s", 0, 5))]
    )
    rig.worker.handle(msg.Forget((1,)))
    admit = msg.Admit(1, tuple(PROMPT), 12, wanted, told=6)
    second = rig.step("s", [admit], [msg.Row(1, 0, 12, True, rig.blocks("s", 0, 12))])
    positions = check(plain(tmp_path / "m"), PROMPT, [*first.scores, *second.scores], 0)
    assert positions == list(range(1, 12))


def test_nobody_asks_nobody_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wishes no softmax over the vocabulary is computed, and the answer has no scores."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"))
    monkeypatch.setattr(scores_module, "_Table", None)
    admit = msg.Admit(1, tuple(PROMPT), 12, asking())
    done = rig.step("s", [admit], [msg.Row(1, 0, 12, True, rig.blocks("s", 0, 12))])
    assert done.scores == ()
    assert len(done.tokens) == 1

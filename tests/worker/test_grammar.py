"""Grammars in the worker: every draw fits, whatever happens to the request; a bad one hurts itself alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from seallmd.core import messages as msg
from seallmd.worker.grammar import GrammarFailed, Grammars, Matcher
from seallmd.worker.sampler import Draw, sample
from tests.worker.helpers import VOCABULARY, Rig, save_tiny

END = 2
PROMPT = (40, 41, 42)
HOSTILE = "start: " + " | ".join(f'"k{i}"' for i in range(5000))


def byte_tokenizer(directory: Path) -> Tokenizer:
    """An id for each of 94 printable characters, behind three special ones."""
    characters = [chr(c) for c in range(0x21, 0x7F)]
    names = ["<pad>", "<s>", "</s>", *characters]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = save_tiny(tmp_path / "m")
    byte_tokenizer(directory)
    return directory


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> Rig:
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", model)
    return rig


def matching(text: str, **fields: object) -> msg.Sampling:
    return msg.Sampling(**{"temperature": 1.0, "grammar": msg.Grammar(text, (END,)), **fields})  # type: ignore[arg-type]


def regex(pattern: str) -> str:
    return f"start: /{pattern}/"


def generate(
    rig: Rig, request: int, sampling: msg.Sampling, limit: int = 40, restart_after: int = -1
) -> list[int]:
    """Draw until the end token; perhaps with a preemption in between."""
    tokens, table, run = list(PROMPT), 0, 0
    admits = [msg.Admit(request, PROMPT, len(PROMPT), sampling)]
    while len(tokens) < len(PROMPT) + limit:
        if len(tokens) - len(PROMPT) == restart_after:
            rig.worker.handle(msg.Forget((request,)))
            admits, table, run, restart_after = (
                [msg.Admit(request, tuple(tokens), len(PROMPT), sampling)],
                0,
                0,
                -1,
            )
        blocks = rig.blocks("s", table, len(tokens))
        table += len(blocks)
        done = rig.step("s", admits, [msg.Row(request, run, len(tokens) - run, True, blocks)])
        assert done.failed == (), done.failed
        run, admits = len(tokens), []
        tokens.append(done.tokens[0])
        if tokens[-1] == END:
            break
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("seed", range(3))
def test_output_matches(rig: Rig, model: Path, seed: int) -> None:
    """A random model under a grammar: what it writes matches and ends where it may."""
    import re

    text = Tokenizer.from_file(str(model / "tokenizer.json"))
    output = generate(rig, 1, matching(regex("[a-f]{3}-[0-9]{2,4}"), seed=seed))
    assert output[-1] == END
    assert re.fullmatch("[a-f]{3}-[0-9]{2,4}", text.decode(output[:-1]))
    schema = (
        '{"type":"object","properties":{"a":{"type":"integer","maximum":99,"minimum":10}},"required":["a"],'
    )
    schema += '"additionalProperties":false,"x-guidance":{"whitespace_flexible":false}}'
    output = generate(rig, 2, matching("start: %json " + schema, seed=seed))
    assert 10 <= json.loads(text.decode(output[:-1]))["a"] <= 99


def test_draws_survive_a_restart(rig: Rig) -> None:
    """After a preemption the matcher is built again from the tokens so far: same draws."""
    sampling = matching(regex("[a-z]{12}"), seed=5)
    whole = generate(rig, 1, sampling)
    assert len(whole) == 13
    assert generate(rig, 2, sampling, restart_after=4) == whole


def test_a_failed_grammar_hurts_its_request_alone(rig: Rig) -> None:
    """A grammar that cannot be compiled is told for its request; the neighbour's row is good."""
    bad = msg.Admit(1, PROMPT, 3, matching("start: nowhere"))
    good = msg.Admit(2, PROMPT, 3, matching(regex("x{5}")))
    rows = [msg.Row(i, 0, 3, True, rig.blocks("s", 0, 3)) for i in (1, 2)]
    done = rig.step("s", [bad, good], rows)
    assert [failed.request for failed in done.failed] == [1]
    assert "nowhere" in done.failed[0].reason
    assert done.tokens[1] == 3 + ord("x") - 0x21
    late = rig.step("s", [], [msg.Row(1, 3, 1, True, ())])  # was on its way when the daemon heard
    assert [failed.request for failed in late.failed] == [1]


def test_rows_behind_the_end_are_free(rig: Rig) -> None:
    """Two steps deep, a row may run behind the end token: no failure, whatever it draws."""
    sampling = matching(regex("x"), temperature=0.0)
    table = rig.blocks("s", 0, 6)
    rig.step("s", [msg.Admit(1, PROMPT, 3, sampling)], [msg.Row(1, 0, 3, True, table)])
    assert rig.step("s", [], [msg.Row(1, 3, 1, True)]).tokens == (END,)
    assert rig.step("s", [], [msg.Row(1, 4, 1, True)]).failed == ()


def matcher(model: Path, text: str) -> Matcher:
    return Grammars().begin(msg.Grammar(text, (END,)), str(model), VOCABULARY)


def test_steps_are_bounded(model: Path) -> None:
    """A grammar that needs too much in one of its steps ends in an error, not in a worker that hangs."""
    hostile = matcher(model, HOSTILE)
    assert hostile.mask([]) is not None
    with pytest.raises(GrammarFailed, match="items"):
        hostile.mask([3 + ord("k") - 0x21])


def test_ends_only_where_the_grammar_does(model: Path) -> None:
    """The end token is allowed exactly where the text is complete."""
    found = matcher(model, regex("ab?"))
    a, b = (3 + ord(c) - 0x21 for c in "ab")
    masks = [found.mask([]), found.mask([a]), found.mask([a, b])]
    assert [[bool(mask[i]) for i in (a, b, END)] for mask in masks if mask is not None] == [
        [True, False, False],
        [False, True, True],
        [False, False, True],
    ]


def test_masks_go_before_bans() -> None:
    """Where bans (min_tokens) and the grammar leave nothing, the grammar wins; else both count."""
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0]])
    only = {0: torch.tensor([False, True, False, False])}
    two = {0: torch.tensor([False, True, True])}  # shorter than the vocabulary
    banned = Draw(msg.Sampling(temperature=0.0, min_tokens=9, banned=(1,)), [0], 1)
    assert sample(logits, [banned], only).tolist() == [1]
    assert sample(logits, [banned], two).tolist() == [2]

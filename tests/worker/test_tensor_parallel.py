"""One model on several devices: what the ranks compute together is what one device computes."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import group, ops
from tests.worker import helpers
from tests.worker.helpers import BLOCK_BYTES, GREEDY, VOCABULARY, Talk, plain, plain_logits, save_tiny
from tests.worker.ranks import Ranks
from tests.worker.test_scores import check

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
    "gpt_neox": 2,  # packed head by head
    "olmo2": 2,  # norms over all heads: gathered before them
    "laguna": 1,  # a gate of one element per head
    "granite_swa": 1,  # sinks: weights outside any layer
}

SMALLER: dict[str, dict[str, Any]] = {
    "laguna": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
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
def test_equals_plain_forward(family: str, two: Ranks, tmp_path: Path) -> None:
    """Chunked prefill, mixed batches and decodes over two ranks give the plain model's logits and tokens."""
    directory = save_tiny(tmp_path / "m", family, vocab_size=VOCABULARY - 1, **SMALLER.get(family, {}))
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


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (2, {"num_key_value_heads": 1}),  # every rank holds the one KV head
        (4, {}),  # pairs of ranks hold the same one
        (3, {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
        (2, {"attention_bias": True, "mlp_bias": True}),
        (2, {"vocab_size": VOCABULARY}),  # odd: embedding and output layer are whole
        (2, {"tie_word_embeddings": True, "vocab_size": VOCABULARY}),
    ],
)
def test_heads_biases_and_vocabularies(
    ranks: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shapes that do not divide as they stand still give the plain model's logits."""
    directory = save_tiny(tmp_path / "m", **{"vocab_size": VOCABULARY - 1, **fields})
    model = plain(directory)
    together = Ranks(monkeypatch, tmp_path, ranks)
    together.load("s", directory)
    a, b = (together.talks(i, "s", prompt(n)) for i, n in enumerate((23, 5)))
    together.step(model, [(a, 9), (b, 5)])
    together.step(model, [(a, 14), (b, 1)])
    together.step(model, [(a, 1), (b, 1)])


def test_sixteen_bits(two: Ranks, tmp_path: Path) -> None:
    """16-bit weights are divided like others, and run in float32 where the compiled operations do."""
    directory = save_tiny(tmp_path / "m", vocab_size=VOCABULARY - 1)
    two.load("s", directory, dtype="bfloat16")
    tokens = prompt(12)
    assert all(isinstance(done, msg.StepDone) for done in two.answers([(two.talks(1, "s", tokens), 12)]))
    rounded = plain(directory).to(torch.bfloat16)
    if ops.compiled() is not None:
        rounded = rounded.float()
    with torch.inference_mode():
        expected = rounded(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    logits = two.rigs[0].logits[0]
    assert logits.dtype is expected.dtype
    torch.testing.assert_close(logits, expected, atol=0.03 if ops.compiled() else 0.15, rtol=0.05)


def test_scores(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of prompts need the other ranks' parts of the vocabulary; rank 0 alone tells them."""
    monkeypatch.setattr(helpers, "GREEDY", msg.Sampling(temperature=0.0, logprobs=1, prompt_logprobs=2))
    directory = save_tiny(tmp_path / "m", vocab_size=VOCABULARY - 1)
    two.load("s", directory)
    talks, tokens = two.talks(1, "s", prompt(12)), prompt(12)
    found: list[msg.Scores] = []
    for count in (5, 7):
        first, second = two.answers([(talks, count)])
        assert second.scores == ()
        found += first.scores
    assert check(plain(directory), [*tokens, first.tokens[0]], found[:-1], 2) == list(range(1, 12))
    assert check(plain(directory), [*tokens, first.tokens[0]], found[-1:], 1) == [12]


def test_pooling(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states are whole on every rank; rank 0 alone tells them."""
    monkeypatch.setattr(helpers, "GREEDY", msg.Sampling(pooling="mean"))
    directory = save_tiny(tmp_path / "m")
    two.load("s", directory)
    talks, tokens = two.talks(1, "s", prompt(12)), prompt(12)
    first, second = two.answers([(talks, 12)])
    assert second.pooled == ()
    (part,) = first.pooled
    with torch.inference_mode():
        model = plain(directory)
        states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    assert np.frombuffer(part.sum, "<f4") == pytest.approx(states.sum(0).numpy(), abs=2e-4)


def test_swapped_out_and_in(two: Ranks, tmp_path: Path) -> None:
    """A service leaves all its devices and comes back with a new group; its requests keep their KV."""
    directory = save_tiny(tmp_path / "m", vocab_size=VOCABULARY - 1)
    model = plain(directory)
    two.load("s", directory)
    talks = two.talks(1, "s", prompt(9))
    two.step(model, [(talks, 9)])
    back = two.evict("s")
    assert "not resident" in two.answers([(two.talks(2, "s", [3]), 1)])[1].reason
    two.copy_in("s", *back)
    two.step(model, [(talks, 1)])
    two.evict("s")
    assert not list((tmp_path / "cache" / "rendezvous").iterdir())


# ------------------------------------------------------------------------------------------- failures


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ranks:
    """Two ranks with the service `s`, and `t` on rank 1 alone."""
    ranks = Ranks(monkeypatch, tmp_path, 2)
    ranks.load("s", save_tiny(tmp_path / "s", vocab_size=VOCABULARY - 1))
    ranks.rigs[1].load("t", save_tiny(tmp_path / "t", "qwen2"))
    return ranks


def alone(ranks: Ranks) -> bool:
    """Whether the other service of rank 1 still runs."""
    rig = ranks.rigs[1]
    admit = msg.Admit(90, (3, 4), 2, GREEDY)
    done = rig.step("t", [admit], [msg.Row(90, 0, 2, True, rig.blocks("t", 0, 2))])
    return isinstance(done, msg.StepDone)


def test_an_error_on_one_rank_fails_the_step_on_all(loaded: Ranks, tmp_path: Path) -> None:
    """The rank that raises leaves, so that the others do not wait; a new group then works at once."""
    good = loaded.talks(1, "s", prompt(5))
    model = plain(tmp_path / "s")
    loaded.step(model, [(good, 5)])
    bad = loaded.talks(2, "s", prompt(4))
    bad[1].tokens[2] = VOCABULARY + 7  # a defect, on rank 1 alone
    first, second = loaded.answers([(bad, 4)])
    assert "outside the vocabulary" in second.reason
    assert "was lost" in first.reason
    for answer in loaded.answers([(loaded.talks(3, "s", [3]), 1)]):  # it was on its way already
        assert "group is broken" in answer.reason
    assert alone(loaded)
    loaded.copy_in("s", *loaded.evict("s"))
    loaded.step(model, [(good, 1)])
    again = loaded.talks(2, "s", prompt(4))
    loaded.step(model, [(again, 4)])


def test_an_error_between_two_collectives(loaded: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that raises in the middle of a forward pass does not leave the others in the next sum."""
    layer = loaded.rigs[1].worker._resident["s"].model.model.layers[2]
    monkeypatch.setattr(layer, "forward", None)
    first, second = loaded.answers([(loaded.talks(1, "s", prompt(4)), 4)])
    assert "was lost" in first.reason
    assert isinstance(second, msg.StepFailed)
    assert alone(loaded)


def test_a_rank_that_does_not_come_to_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank that lives but is stuck fails the step when the time is up."""
    monkeypatch.setattr(group, "STEP_SECONDS", 0.3)
    ranks = Ranks(monkeypatch, tmp_path, 2)
    ranks.load("s", save_tiny(tmp_path / "m"))
    talk = ranks.talks(1, "s", [3, 4])[0]
    admits, row = talk.row(2)
    failed = ranks.rigs[0].step("s", admits, [row])
    assert isinstance(failed, msg.StepFailed)
    assert "was lost" in failed.reason


def test_a_rank_that_does_not_come_to_the_group(loaded: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others step while a copy waits for its group, which has a limit."""
    back = loaded.evict("s")
    monkeypatch.setattr(group, "JOIN_SECONDS", 0.3)
    loaded.groups += 1
    loaded.say_copy_in("s", *back, members=[1])
    worker = loaded.rigs[1].worker
    while worker.advance():  # copied; from here on there is nothing to do but wait
        pass
    assert worker.copying
    assert alone(loaded)
    with pytest.raises(group.GroupLost):
        worker._arriving[0].joining._result.result()  # waits for the limit
    worker.advance()
    failed = loaded.rigs[1].take()
    assert isinstance(failed, msg.CopyFailed)
    assert "did not come together" in failed.reason
    assert alone(loaded)
    loaded.rigs[1].evict("s")
    monkeypatch.undo()


def test_a_copy_that_is_cancelled_while_it_waits(loaded: Ranks) -> None:
    """DropWeights is carried out at once; whoever comes to that group later finds it left."""
    back = loaded.evict("s")
    loaded.groups += 1
    loaded.say_copy_in("s", *back, members=[1])
    joining = loaded.rigs[1].worker._arriving[0].joining
    loaded.rigs[1].evict("s")
    assert not loaded.rigs[1].worker.copying
    loaded.say_copy_in("s", *back, members=[0])  # it had not heard of it yet
    while loaded.rigs[0].worker.copying:
        loaded.rigs[0].worker.advance()
    assert not joining.done()  # there is nobody to take it
    talk = loaded.talks(1, "s", [3, 4])[0]
    loaded.rigs[0].take()
    admits, row = talk.row(2)
    failed = loaded.rigs[0].step("s", admits, [row])
    assert "was lost" in failed.reason
    assert alone(loaded)


def test_a_copy_behind_one_that_waits(loaded: Ranks) -> None:
    """A service that waits for its group does not keep the next one from coming in."""
    back, other = loaded.evict("s"), loaded.rigs[1].evict("t")
    loaded.groups += 1
    loaded.say_copy_in("s", *back, members=[1])
    rig = loaded.rigs[1]
    probed, image = other
    at, extents = 0, []
    for size in probed.shape.segments:
        extents.append(msg.Extent(at, size, rig.take_run(-(-size // BLOCK_BYTES)) * BLOCK_BYTES))
        at += size
    rig.worker.handle(msg.CopyIn("t", probed.directory, "float32", 256, image, tuple(extents), 8))
    while rig.worker.advance():
        pass
    assert rig.take().service == "t"
    assert rig.worker.copying
    assert alone(loaded)
    rig.evict("s")


def test_a_limit_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a backend waits for, the limit holds; a group that comes to be later is left."""
    monkeypatch.setattr(group, "JOIN_SECONDS", -1.0)
    left, come = threading.Event(), threading.Event()

    class Late:
        def leave(self) -> None:
            left.set()

    def late(*_: object) -> Late:
        come.wait()
        return Late()

    monkeypatch.setattr(group, "_join", late)
    joining = group.Joining(msg.Group(1, 0, 2), torch.device("cpu"), tmp_path)
    assert joining.done()
    with pytest.raises(group.GroupLost, match="timeout"):
        joining.take()
    joining.give_up()
    come.set()
    assert left.wait(30)


def test_groups_that_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Devices 0, 1 and 2 in groups {0, 1}, {1, 2} and {2, 0}: steps in one order never wait in a ring."""
    ranks = Ranks(monkeypatch, tmp_path, 3)
    directory = save_tiny(tmp_path / "m", vocab_size=VOCABULARY - 1)
    probed, image = ranks.prepare("one", directory, ranks=2)
    pairs = {"one": (0, 1), "two": (1, 2), "three": (2, 0)}
    for service, members in pairs.items():
        ranks.groups += 1
        ranks.say_copy_in(service, probed, image, members, ranks=(0, 1))
    for rig in ranks.rigs:
        while rig.worker.copying:
            rig.worker.advance()
        assert [type(m) for m in rig.said if not isinstance(m, msg.JobProgress)] == [msg.CopyDone] * 2
    order = random.Random(5).choices(list(pairs), k=60)
    talks = {s: [Talk(ranks.rigs[m], i, s, prompt(4)) for m in pairs[s]] for i, s in enumerate(pairs)}
    sent: list[list[msg.Step]] = [[], [], []]
    for number, service in enumerate(order):
        for device, talk in zip(pairs[service], talks[service], strict=True):
            admits, row = talk.row(len(talk.tokens) - talk.run)
            talk.tokens.append(0)  # drawn by the ranks themselves
            sent[device].append(msg.Step(number, service, tuple(admits), (row,)))
    ranks.each(lambda rig, steps: [rig.worker.handle(step) for step in steps], ranks.rigs, sent)
    model, drawn = plain(directory), {}
    for rig in ranks.rigs:
        for done in rig.said:
            if isinstance(done, msg.StepDone) and done.tokens:
                drawn.setdefault(order[done.step], {})[done.step] = done.tokens[0]
    for service in pairs:
        tokens = prompt(4)
        for step in sorted(drawn[service]):
            assert drawn[service][step] == int(plain_logits(model, tokens).argmax())
            tokens.append(drawn[service][step])
        assert len(tokens) == 4 + order.count(service)

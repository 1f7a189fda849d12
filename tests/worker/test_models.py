"""Real families, tiny and random, through the whole path: probe, image, arena, steps."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import ops
from tests.worker.helpers import BLOCK_BYTES, FAMILIES, VOCABULARY, Rig, Talk, plain, run_step, save_tiny


@pytest.fixture(params=["torch", "compiled"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """Everything is to hold with the compiled operations and without."""
    if request.param == "compiled":
        request.getfixturevalue("native")
    return Rig(monkeypatch, tmp_path / "cache")


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, VOCABULARY), k=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forward(family: str, rig: Rig, tmp_path: Path) -> None:
    """Chunked prefill, mixed batches and decodes over fragmented tables give the plain model's logits."""
    directory = save_tiny(tmp_path / "m", family)
    model = plain(directory)
    rig.load("s", directory)
    rig.spoil(rig.free)
    a, b, c = (Talk(rig, i, "s", prompt(n)) for i, n in enumerate((23, 5, 41)))
    run_step(rig, model, [(a, 9), (b, 5)])
    run_step(rig, model, [(a, 14), (b, 1), (c, 30)])
    run_step(rig, model, [(b, 1), (c, 11), (a, 1)])
    for _ in range(4):
        run_step(rig, model, [(a, 1), (b, 1), (c, 1)])


def test_two_services_in_one_arena(rig: Rig, tmp_path: Path) -> None:
    """Steps of services with different KV shapes interleave, blocks move and models leave and come back."""
    models, talks = {}, {}
    for service, family in (("one", "llama"), ("two", "gemma3_text")):
        directory = save_tiny(tmp_path / service, family)
        models[service] = plain(directory)
        rig.load(service, directory)
        talks[service] = [Talk(rig, len(talks) * 10 + i, service, prompt(n)) for i, n in enumerate((30, 7))]

    def decode(service: str) -> None:
        run_step(rig, models[service], [(talk, len(talk.tokens) - talk.run) for talk in talks[service]])

    for _ in range(3):
        decode("one")
        decode("two")
    move_all(rig, talks["one"][0])
    decode("one")
    decode("two")
    back = rig.evict("one")  # its requests keep their KV
    decode("two")
    rig.take_run(3)
    rig.copy_in("one", *back)
    decode("one")
    talks["one"][1].restart()
    decode("one")
    decode("two")


def move_all(rig: Rig, talk: Talk) -> None:
    """Move a request's blocks, each into the place of the one before it, the first into a free one."""
    places = [rig.free.pop(), *talk.table]
    rig.worker.handle(msg.MoveBlocks(tuple(talk.table), tuple(places[:-1])))
    rig.device.arena.view(-1, BLOCK_BYTES)[places[-1]] = 255
    rig.free.append(places[-1])
    talk.table = places[:-1]


def test_shared_prefix(rig: Rig, tmp_path: Path) -> None:
    """A request that starts behind another's blocks reads them and does not wipe them."""
    directory = save_tiny(tmp_path / "m")
    model = plain(directory)
    rig.load("s", directory)
    size = BLOCK_BYTES // rig.shapes["s"].kv_bytes_per_token
    first = Talk(rig, 1, "s", prompt(2 * size + 3))
    run_step(rig, model, [(first, len(first.tokens))])
    second = Talk(rig, 2, "s", first.tokens[: 2 * size] + prompt(5, seed=9))
    rest = rig.blocks("s", 2, len(second.tokens))
    admit, _ = second.row(0)
    row = msg.Row(2, 2 * size, len(second.tokens) - 2 * size, True, (*first.table[:2], *rest))
    done = rig.step("s", admit, [row])
    second.run, second.table = len(second.tokens), list(row.blocks)
    second.tokens.append(done.tokens[0])
    for _ in range(3):
        run_step(rig, model, [(first, 1), (second, 1)])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_does_not_depend_on_the_batch(kind: str, rig: Rig, tmp_path: Path) -> None:
    """A long neighbour must not change the rotary frequencies of a short request."""
    scaling: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    fields: dict[str, object] = {}
    if kind == "longrope":
        scaling |= {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 32,
        }
        fields = {"original_max_position_embeddings": 32}
    directory = save_tiny(tmp_path / "m", "phi3" if fields else "llama", rope_parameters=scaling, **fields)
    rig.load("s", directory)
    long, short = prompt(60), prompt(9)
    blocks = rig.blocks("s", 0, 60), rig.blocks("s", 0, 9), rig.blocks("s", 0, 9)
    greedy = msg.Sampling(temperature=0.0)
    rig.step("s", [msg.Admit(1, tuple(short), 9, greedy)], [msg.Row(1, 0, 9, True, blocks[1])])
    alone = rig.logits[0]
    admits = [msg.Admit(2, tuple(long), 60, greedy), msg.Admit(3, tuple(short), 9, greedy)]
    rig.step("s", admits, [msg.Row(2, 0, 60, True, blocks[0]), msg.Row(3, 0, 9, True, blocks[2])])
    torch.testing.assert_close(rig.logits[1], alone, atol=2e-4, rtol=0)


def test_bfloat16(rig: Rig, tmp_path: Path) -> None:
    """A 16-bit service stays near the float32 model: in its own dtype, or exactly in float32.

    Products of bfloat16 alone (`Native.rounds`) are switched off here: test_ops looks at those.
    """
    directory = save_tiny(tmp_path / "m")
    rig.load("s", directory, dtype="bfloat16")
    assert rig.shapes["s"].itemsize == 2
    tokens = prompt(12)
    admit = msg.Admit(1, tuple(tokens), 12, msg.Sampling(temperature=0.0))
    compiled = ops.compiled()
    with nullcontext() if compiled is None else compiled.exactly():
        rig.step("s", [admit], [msg.Row(1, 0, 12, True, rig.blocks("s", 0, 12))])
    rounded = plain(directory).to(torch.bfloat16)
    if compiled is not None:  # weights are rounded, and K and V as they are stored; nothing else is
        rounded = rounded.float()
    with torch.inference_mode():
        expected = rounded(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert rig.logits.dtype is expected.dtype
    torch.testing.assert_close(rig.logits[0], expected, atol=0.03 if compiled else 0.15, rtol=0.05)

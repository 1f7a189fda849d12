"""Weights of 8 bits in blocks: the scheme, its kernel against its reference, and models served so."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from seallmd.core import messages as msg
from seallmd.core.cost import Work
from seallmd.worker import ops
from seallmd.worker.image import Image
from seallmd.worker.image_cache import ImageCache
from seallmd.worker.layout import layout_of_rank
from seallmd.worker.ops.native import Native, linear_struct
from seallmd.worker.probe import probe
from seallmd.worker.quantised import (
    BLOCK,
    PANEL,
    REST_DTYPE,
    WEIGHT_BYTES,
    Blocks,
    QuantisedEmbedding,
    QuantisedLinear,
    quantise,
)
from tests.worker.helpers import GREEDY, VOCABULARY, Rig, plain, plain_logits, save_tiny
from tests.worker.ranks import Ranks
from tests.worker.test_ops import noise

# None of them a multiple of anything; then whole blocks and panels.
SHAPES = [(1, 1), (3, 5), (4, 16), (9, 37), (130, 64), (257, 100), (16, 32), (64, 576)]
GROUP = 16  # activations that share a scale


def blocks_of(whole: torch.Tensor) -> Blocks:
    blocks = Blocks.empty(*whole.shape)
    blocks.fill(whole)
    return blocks


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernel takes them."""
    parts = functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = parts.abs().amax(-1, keepdim=True) / 127
    return torch.where(step == 0, 0.0, (parts / step).round() * step).flatten(-2)[..., : x.shape[-1]]


# -------------------------------------------------------------------------------------------- the scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_no_weight_is_off_by_more_than_half_a_step(n: int, k: int, dtype: torch.dtype) -> None:
    """A step is the block's largest weight / 127, whatever the other blocks hold."""
    whole = (noise(n, k) * 10.0 ** torch.arange(k).div(BLOCK, rounding_mode="floor").remainder(4)).to(dtype)
    blocks = blocks_of(whole)
    parts = functional.pad(whole.float(), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    step = (parts / 127).repeat_interleave(BLOCK, -1)[:, :k]
    assert bool(((blocks.wide(0, n) - whole.float()).abs() <= 0.502 * step + 1e-9).all())
    assert torch.equal(blocks.rows(torch.arange(n)), blocks.wide(0, n))


def test_unusual_weights() -> None:
    """Zeros stay zeros, the smallest numbers are no division by zero, and what is no number shows."""
    whole = torch.zeros(PANEL, 3 * BLOCK)
    whole[0, BLOCK : 2 * BLOCK] = 1e-12
    whole[1, 2 * BLOCK] = float("nan")
    found = blocks_of(whole).wide(0, PANEL)
    assert found[1, 2 * BLOCK :].isnan().all()
    assert torch.equal(found[:, : 2 * BLOCK], torch.zeros(PANEL, 2 * BLOCK))


def test_quantising_again_changes_nothing() -> None:
    """What was quantised is on the steps already: a GGUF of Q8_0 loses nothing."""
    first = blocks_of(noise(64, 96))
    again = blocks_of(first.wide(0, 64))
    assert torch.equal(first.weight, again.weight)
    torch.testing.assert_close(first.scale, again.scale, atol=0, rtol=0)


def test_large_matrices_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not tell."""
    whole, x = noise(100, 70), noise(3, 70, seed=1)
    expected = blocks_of(whole)
    monkeypatch.setattr("seallmd.worker.quantised._CHUNK", 70 * 40)
    found = blocks_of(whole)
    assert torch.equal(found.weight[:, :, :, :4], expected.weight[:, :, :, :4])
    assert torch.equal(found.wide(0, 100), expected.wide(0, 100))
    torch.testing.assert_close(found.linear(x, None), functional.linear(x, expected.wide(0, 100)))


# -------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool, native: Native) -> None:
    """Any number of rows, outputs and inputs: products of rounded activations, or of these themselves."""
    rng = random.Random(3)
    for n, k in SHAPES:
        blocks, b = blocks_of(noise(n, k)), noise(n, seed=1).to(REST_DTYPE) if bias else None
        struct = linear_struct(blocks, b)
        for m in {1, 2, 3, 5, 6, 7, 13, 40, rng.randint(14, 40)}:
            x = noise(1, m, k, seed=m)
            ours = native.linear(x, struct)
            torch.testing.assert_close(ours, blocks.linear(rounded(x), b), atol=2e-4, rtol=1e-5)
            with native.exactly():
                ours = native.linear(x, struct)
            torch.testing.assert_close(ours, blocks.linear(x, b), atol=2e-4, rtol=1e-5)


def test_linear_rows_do_not_depend_on_their_batch(native: Native) -> None:
    """A row's sums run in one order whoever is beside it, and however many threads share the panels."""
    x, blocks = noise(23, 83, seed=1), blocks_of(noise(6700, 83))
    struct = linear_struct(blocks, None)
    together = native.linear(x, struct)
    assert torch.equal(together, torch.stack([native.linear(row, struct) for row in x]))
    try:
        native.set_threads(3)
        for _ in range(50):
            assert torch.equal(native.linear(x, struct), together)
    finally:
        native.set_threads(1)


def test_activations_that_are_no_numbers_show(native: Native) -> None:
    """In their own rows alone; rows of zeros, and of the smallest numbers, are no division by zero."""
    x = noise(5, 64)
    x[1, 3], x[2, 5], x[3], x[4] = float("nan"), float("inf"), 0.0, 1e-40
    blocks = blocks_of(noise(48, 64, seed=1))
    out = native.linear(x, linear_struct(blocks, None))
    assert not out[1:3].isfinite().any()
    assert torch.equal(out[3:], torch.zeros(2, 48))
    assert out[0].isfinite().all()


# -------------------------------------------------------------------------------------------- whole models


def as_quantised(directory: Path) -> PreTrainedModel:
    """The plain model in float32 with the numbers that the blocks hold, and all else in 16 bits."""
    model = plain(directory)
    owners = {m.weight: m for m in model.modules() if type(m) is nn.Linear or isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter in owners and parameter.shape[0] >= PANEL:
                parameter.copy_(blocks_of(parameter).wide(0, parameter.shape[0]))
            else:
                parameter.copy_(parameter.to(REST_DTYPE))
    return model


@pytest.fixture(params=["torch", "compiled"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """Everything is to hold with the compiled operations and without."""
    if request.param == "compiled":
        request.getfixturevalue("native")
    return Rig(monkeypatch, tmp_path / "cache")


def answer(rig: Rig, tokens: list[int], exactly: bool = True) -> torch.Tensor:
    """Logits behind `tokens`; with activations as they are, if there is a choice."""
    compiled = ops.compiled()
    admit = msg.Admit(rig.steps, tuple(tokens), len(tokens), GREEDY)
    row = msg.Row(rig.steps, 0, len(tokens), True, rig.blocks("s", 0, len(tokens)))
    with compiled.exactly() if compiled is not None and exactly else nullcontext():
        done = rig.step("s", [admit], [row])
    assert isinstance(done, msg.StepDone), done
    return rig.logits[0].float()


@pytest.mark.parametrize(
    "family", ["llama", "llama tied", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "mixtral", "gpt_oss"]
)
def test_families(family: str, rig: Rig, tmp_path: Path) -> None:
    """Tied or not, scaled or not, with biases and experts: the model that has the blocks' numbers, but for
    the rounding of K and V, and of activations where they are not float32."""
    directory = save_tiny(tmp_path / "m", family)
    rig.load("s", directory, dtype="int8")
    shape, tokens = rig.shapes["s"], list(range(3, 15))
    assert (shape.dtype, shape.itemsize, shape.bytes_per_weight) == ("int8", 2, WEIGHT_BYTES)
    resident = rig.worker._resident["s"]
    kinds = [type(m) for m in resident.model.modules()]
    assert QuantisedEmbedding in kinds
    assert nn.Linear not in kinds or family == "gpt_oss", "a router of experts alone is too small"
    expected = plain_logits(as_quantised(directory), tokens)
    ours = answer(rig, tokens)
    wide = ops.compiled() is not None and family not in {"gpt2", "mixtral", "gpt_oss"}
    error = (ours - expected).norm() / expected.norm()
    assert error < (0.01 if wide else 0.05)
    if ops.compiled() is not None:
        replaced = dict(resident.fast.replaced())
        linears = kinds.count(QuantisedLinear)
        assert replaced.get("int8 linear layers", 0) == linears
        whole = family in {"llama", "llama tied", "qwen2", "qwen3", "gemma3_text"}
        assert replaced.get("stack of all layers", 0) == whole


@pytest.mark.usefixtures("native")
def test_rounded_activations_stay_near(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the kernel rounds changes logits by little."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"), dtype="int8")
    tokens = list(range(3, 30))
    exact, fast = answer(rig, tokens), answer(rig, tokens, exactly=False)
    assert 0 < (exact - fast).norm() / exact.norm() < 0.03


@pytest.mark.usefixtures("native")
def test_the_same_tokens_whoever_is_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Alone, in a batch, in one chunk or in several: the same bits."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"), dtype="int8")
    tokens, others = tuple(range(3, 30)), tuple(range(40, 60))
    alone = answer(rig, list(tokens), exactly=False)
    blocks = rig.blocks("s", 0, 27)
    admits = [msg.Admit(70, tokens, 27, GREEDY), msg.Admit(71, others, 20, GREEDY)]
    rig.step("s", admits[:1], [msg.Row(70, 0, 10, False, blocks)])
    rows = [msg.Row(71, 0, 20, True, rig.blocks("s", 0, 20)), msg.Row(70, 10, 17, True)]
    rig.step("s", admits[1:], rows)
    assert torch.equal(rig.logits[1].float(), alone)


def test_evicted_and_back(rig: Rig, tmp_path: Path) -> None:
    """Elsewhere in the arena, from the same image: the same bits."""
    rig.load("s", save_tiny(tmp_path / "m", "llama tied"), dtype="int8")
    tokens = list(range(3, 20))
    before = answer(rig, tokens)
    back = rig.evict("s")
    rig.take_run(3)
    rig.copy_in("s", *back)
    assert torch.equal(answer(rig, tokens), before)


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma3_text"])
@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_equal_one(
    family: str,
    compiled: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Cuts at whole blocks leave every number as it is; only sums run in another order."""
    if compiled:
        request.getfixturevalue("native")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": VOCABULARY - 1}
    directory = save_tiny(tmp_path / "m", family, **sizes)
    one = Rig(monkeypatch, tmp_path / "one")
    one.load("s", directory, dtype="int8")
    tokens = list(range(3, 20))
    alone = answer(one, tokens)
    two = Ranks(monkeypatch, tmp_path, 2)
    two.load("s", directory, dtype="int8")
    native = ops.compiled()
    with native.exactly() if native is not None else nullcontext():
        assert all(isinstance(d, msg.StepDone) for d in two.answers([(two.talks(1, "s", tokens), 17)]))
    together = two.rigs[0].logits[0].float()
    assert (together - alone).norm() / alone.norm() < (0.005 if compiled else 0.02)


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_that_are_no_whole_blocks(ranks: int, tmp_path: Path) -> None:
    """A rank's part is quantised as a matrix of its own, so that any cut will do."""
    probed = probe(save_tiny(tmp_path / "m", vocab_size=96), "int8", 0)
    layout = layout_of_rank(probed.skeleton, ranks, in_blocks=True)
    assert layout.segments == next(s for s in probed.shape.shards if s.ranks == ranks).segments
    image = Image("s", probed, ranks, lambda *_: None)
    assert image.bytes_ == ranks * layout.bytes_
    image.close()


def test_images_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart finds what it built; another dtype or another scheme is another image."""
    directory = save_tiny(tmp_path / "m")
    cache = ImageCache(tmp_path / "images", 1 << 30, print)

    def built(dtype: str) -> bool:
        image = Image("s", probe(directory, dtype, 0), 1, lambda *_: None, cache)
        image.close()
        if image.keeping is not None:
            image.keeping.join()
        return image.keeping is not None

    assert [built(dtype) for dtype in ("bfloat16", "int8", "int8", "bfloat16")] == [True, True, False, False]
    monkeypatch.setattr("seallmd.worker.image.SCHEME", "int8 of another order")
    assert built("int8")
    assert not built("bfloat16")


def test_what_is_kept_in_sixteen_bits(tmp_path: Path) -> None:
    """Experts in one tensor, convolutions, norms, biases; a tie is one matrix."""
    skeleton = probe(save_tiny(tmp_path / "moe", "mixtral", tie_word_embeddings=True), "int8", 0).skeleton
    quantise(skeleton)
    kept = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, p in skeleton.named_parameters()
        if p.dtype == REST_DTYPE
    }
    assert kept == {"experts", "gate", "input_layernorm", "post_attention_layernorm", "norm"}
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for leaf in ("weight", "scale"):
        assert parameters[f"lm_head.{leaf}"] is parameters[f"model.embed_tokens.{leaf}"]


def test_memory_and_costs(tmp_path: Path) -> None:
    """Half the bytes and a sixteenth; what a step computes is the same, and the vocabulary is still known."""
    directory = save_tiny(
        tmp_path / "m", vocab_size=65536, hidden_size=160, intermediate_size=64, tie_word_embeddings=True
    )
    wide, short = (probe(directory, dtype, 0).shape for dtype in ("bfloat16", "int8"))
    assert short.weights_bytes / wide.weights_bytes == pytest.approx(WEIGHT_BYTES / 2, rel=0.01)
    assert short.kv_bytes_per_token == wide.kv_bytes_per_token
    ours, theirs = Work.of(short), Work.of(wide)
    assert (ours.row_flops, ours.context_bytes) == (theirs.row_flops, theirs.context_bytes)
    assert ours.token_flops == pytest.approx(theirs.token_flops, rel=0.05)
    assert ours.output_bytes == 65536 * 160 * WEIGHT_BYTES

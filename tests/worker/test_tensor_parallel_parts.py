"""Who holds what of a model that is split over several devices, and which models are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker.image import Image
from seallmd.worker.layout import Layout, layout_of_rank
from seallmd.worker.parallel import Cut, Indivisible, Seat, divide
from seallmd.worker.probe import Probed, probe
from tests.worker.helpers import Rig, save_tiny


def probed(tmp_path: Path, family: str = "llama", **overrides: Any) -> Probed:
    return probe(save_tiny(tmp_path / "m", family, **overrides), "auto", 0)


def contents(image: Image, layout: Layout, at: int) -> dict[str, torch.Tensor]:
    """Every weight of one part of an image, by name."""
    memory = torch.from_file(image.path, shared=False, size=image.bytes_, dtype=torch.uint8)[at:]
    return {
        name: memory[place.at : place.at + place.bytes_].view(place.dtype).view(place.shape)
        for place in layout.places
        for name in place.names
    }


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("phi3", {}), ("qwen3_moe", {}), ("mixtral", {})],
)
def test_parts_are_slices_of_the_whole(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Rank r's part of an image holds its slices of every weight, whether read from files or converted."""
    model = probed(tmp_path, family, vocab_size=96, **fields)
    whole_image = Image("s", model, 1, lambda *_: None)
    whole = contents(whole_image, model.layout, 0)
    progress: list[tuple[int, int]] = []
    image = Image("s", model, 2, lambda *done: progress.append(done))
    layout = layout_of_rank(model.skeleton, 2)
    shard = next(shard for shard in model.shape.shards if shard.ranks == 2)
    assert shard.segments == layout.segments
    assert progress[-1] == (image.bytes_, image.bytes_) == (2 * layout.bytes_, 2 * layout.bytes_)
    halves = [contents(image, layout, rank * layout.bytes_) for rank in range(2)]
    cuts = [divide(model.skeleton, rank, 2).cuts for rank in range(2)]
    divided = 0
    for name, tensor in whole.items():
        for half, cut in zip(halves, cuts, strict=True):
            expected = cut[name].of(tensor) if name in cut else tensor
            assert torch.equal(half[name], expected), name
            divided += half[name].shape != tensor.shape
    assert divided
    for built in (whole_image, image):
        built.close()


def test_every_element_has_one_owner(tmp_path: Path) -> None:
    """Together the ranks hold each row of a divided weight once; packed weights are divided twice."""
    model = probed(tmp_path, "qwen3_moe", vocab_size=96)
    cuts = [divide(model.skeleton, rank, 2).cuts for rank in range(2)]
    packed = 0
    for name, tensor in model.skeleton.named_parameters():
        if name not in cuts[0]:
            continue
        rows = torch.arange(tensor.shape[cuts[0][name].dim])
        owned = torch.cat([Cut(0, cut[name].ranges).of(rows) for cut in cuts])
        assert torch.equal(owned.sort().values, rows), name
        packed += len(cuts[0][name].ranges) == 2
    assert packed == 4


def test_a_bias_behind_a_sum_is_added_once(tmp_path: Path) -> None:
    """Row-parallel layers keep their bias on rank 0; on the others it is zero."""
    model = probed(tmp_path, "llama", attention_bias=True)
    name = "model.layers.0.self_attn.o_proj.bias"
    ones = torch.ones(32)
    assert [divide(model.skeleton, rank, 2).cuts[name].of(ones).sum() for rank in range(2)] == [32, 0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards"),
    [
        (4, 2, {2: 1, 4: 1}),
        (4, 1, {2: 1, 4: 1}),  # fewer KV heads than ranks: neighbours hold the same one
        (6, 3, {3: 1, 6: 1}),  # two ranks would need heads and a half
        (8, 8, {2: 4, 4: 2, 8: 1}),
        (3, 3, {3: 1}),
    ],
)
def test_divisible_by_heads(heads: int, kv_heads: int, shards: dict[int, int], tmp_path: Path) -> None:
    """What the probe offers: KV heads of one rank, by the number of ranks."""
    model = probed(tmp_path, hidden_size=48, num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert {s.ranks: s.layers[0].kv_heads for s in model.shape.shards} == shards
    assert all(len(s.layers) == 4 for s in model.shape.shards)


def test_neighbours_share_a_kv_head(tmp_path: Path) -> None:
    """Four ranks of two KV heads: ranks 0 and 1 hold the first, 2 and 3 the second."""
    model = probed(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    starts = [divide(model.skeleton, rank, 4).cuts[name].ranges for rank in range(4)]
    assert starts == [((0, 8),), ((0, 8),), ((8, 8),), ((8, 8),)]


def test_an_odd_vocabulary_stays_whole(tmp_path: Path) -> None:
    """Embedding and output layer are on every rank where their rows cannot be divided; layers are divided."""
    cuts = divide(probed(tmp_path, vocab_size=97).skeleton, 1, 2).cuts
    assert "lm_head.weight" not in cuts
    assert "model.embed_tokens.weight" not in cuts
    assert "model.layers.0.self_attn.q_proj.weight" in cuts


def test_a_tie_outlives_a_plan_that_ignores_it(tmp_path: Path) -> None:
    """Embedding and output layer are one tensor: if the plan divides only one of them, it stays whole."""
    model = probed(tmp_path, "llama tied", vocab_size=96).skeleton
    assert divide(model, 0, 2).cuts["lm_head.weight"] == divide(model, 0, 2).cuts["model.embed_tokens.weight"]
    model.tp_plan = {k: v for k, v in model.tp_plan.items() if k != "model.embed_tokens"}
    divided = divide(model, 0, 2)
    assert "lm_head.weight" not in divided.cuts
    assert "lm_head" not in divided.styles


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt2", "no tensor-parallel plan"), ("gpt_oss", "divides no layer")]
)
def test_models_for_one_device(family: str, reason: str, tmp_path: Path) -> None:
    """A family without a plan has no shards, and asking for a divided image is refused with the reason."""
    model = probed(tmp_path, family)
    assert model.shape.shards == ()
    with pytest.raises(Indivisible, match=reason):
        divide(model.skeleton, 0, 2)


def test_unknown_styles_are_refused(tmp_path: Path) -> None:
    """A style of a later transformers is not guessed at."""
    model = probed(tmp_path).skeleton
    model._tp_plan = {**model.tp_plan, "model.layers.*.mlp": "spiral"}
    with pytest.raises(Indivisible, match="spiral"):
        divide(model, 0, 2)


def test_the_host_builds_for_as_many_ranks_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image for another number of ranks takes the place of the former; an impossible one is told."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    shape = rig.probe("s", save_tiny(tmp_path / "m")).shape
    images = []
    for ranks in (1, 2, 2, 1):
        rig.host.handle(msg.BuildImage("s", ranks=ranks))
        images.append(rig.take())
    assert [image.bytes_ for image in images[1:3]] == [2 * sum(shape.shards[0].segments)] * 2
    assert images[1].path == images[2].path  # it was kept
    assert images[0].bytes_ == images[3].bytes_ == shape.weights_bytes
    rig.host.handle(msg.BuildImage("s", ranks=3))
    failed = rig.take()
    assert isinstance(failed, msg.ImageFailed)
    assert "3 devices" in failed.reason


def test_an_empty_seat_shows_shapes() -> None:
    """Before the others are there, a rank's layers store what they will store."""
    seat, part = Seat(1, 3), torch.ones(2, 4)
    assert seat.concatenate(part).shape == (2, 12)
    assert seat.sum(part) is part

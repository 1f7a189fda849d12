"""The table of models, and the words for models and devices."""

from __future__ import annotations

import pytest

from seallmd.core.cost import ROOFLINES, Work
from seallmd.sim.models import MODELS, PRESETS, SimError, block_bytes_for, parse_devices, parse_models

# Parameters in millions as published, and KiB of KV per token.
PUBLISHED = {
    "llama-7b": (6738, 512),
    "llama-13b": (13016, 800),
    "llama-30b": (32529, 1560),
    "llama-65b": (65286, 2560),
    "llama-3.1-8b": (8030, 128),
    "smollm2-135m": (134.5, 45),
    "gemma-3-270m": (268.1, 36),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name: str) -> None:
    """Protects the arithmetic of shapes."""
    shape = MODELS[name].shape()
    millions, kib = PUBLISHED[name]
    assert shape.weights_bytes / shape.itemsize / 1e6 == pytest.approx(millions, rel=0.002)
    assert shape.kv_bytes_per_token == kib * 1024


def test_services_are_named_after_their_models() -> None:
    """Protects MuxServe's mix: 19 services, each with a name of its own."""
    shapes = parse_models("muxserve")
    assert len(shapes) == 19
    assert list(shapes)[:2] == ["llama-7b-1", "llama-7b-2"]
    assert list(parse_models("llama-7b,2*llama-7b")) == ["llama-7b-1", "llama-7b-2", "llama-7b-3"]
    for text in PRESETS:
        assert parse_models(text)


def test_groups_of_devices_act_as_one() -> None:
    """Protects groups: sums of memory and speed, one fixed cost."""
    one, group = parse_devices("a100-80g,a100-80g:4")
    assert one is ROOFLINES["a100-80g"]
    assert group.memory_bytes == 4 * one.memory_bytes
    work = Work.of(MODELS["llama-7b"].shape())
    assert group.step(work, 1, 1, 1) - group.step_seconds == pytest.approx(
        (one.step(work, 1, 1, 1) - one.step_seconds) / 4
    )
    assert len(parse_devices("32*a100-80g")) == 32
    assert [device.memory_bytes >> 30 for device in parse_devices("2*cpu@3,h100:2@50")] == [3, 3, 50]


@pytest.mark.parametrize(
    ("devices", "models", "mib"),
    [("cpu", "cpu", 0.5), ("h100", "llama-3.1-8b", 2), ("h200", "llama-65b", 16)],
)
def test_blocks_suit_devices_and_models(devices: str, models: str, mib: float) -> None:
    """Protects small arenas from rounding, and large models from being refused."""
    assert block_bytes_for(parse_devices(devices), parse_models(models).values()) == mib * (1 << 20)


@pytest.mark.parametrize("text", ["", "gpt-9", "0*llama-7b", "x*llama-7b", "llama-7b,"])
def test_unknown_models_are_refused(text: str) -> None:
    """Protects against runs with other models than meant."""
    with pytest.raises(SimError):
        parse_models(text)


@pytest.mark.parametrize("text", ["", "tpu", "2*", "a100-80g:0", "a100-80g:x", "cpu@", "cpu@x"])
def test_unknown_devices_are_refused(text: str) -> None:
    """Protects against runs on other devices than meant."""
    with pytest.raises(SimError):
        parse_devices(text)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_layers_and_output(name: str) -> None:
    """Protects predictions: an embedding is looked up, the output layer runs for rows that draw alone."""
    decoder, work = MODELS[name], Work.of(MODELS[name].shape())
    vocabulary = decoder.vocab * decoder.hidden
    parameters = PUBLISHED[name][0] * 1e6 - vocabulary * (1 if decoder.tied else 2)
    assert work.token_flops == pytest.approx(2 * parameters, rel=0.005)
    assert work.row_flops == pytest.approx(2 * vocabulary, rel=0.001)


# Milliseconds of (tokens, context, rows) on one otherwise idle core, float32, best of 3 (docs/benchmarks.md).
MEASURED = {
    "smollm2-135m": {(128, 128, 1): 306.0, (512, 512, 1): 1469.1, (1, 36, 1): 20.8, (16, 576, 16): 67.1},
    "gemma-3-270m": {(128, 128, 1): 308.6, (512, 512, 1): 1236.9, (1, 36, 1): 39.4, (16, 576, 16): 127.8},
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_cpu_roofline_is_what_was_measured(name: str) -> None:
    """Protects the calibration: prompts and decode steps of both models that this project tests with."""
    work, cpu = Work.of(MODELS[name].shape()), ROOFLINES["cpu"]
    for step, milliseconds in MEASURED[name].items():
        assert cpu.step(work, *step) * 1e3 == pytest.approx(milliseconds, rel=0.2)

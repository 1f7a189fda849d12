"""Models that must be refused: each with a reason, and none may bring the host process down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from seallmd.core import messages as msg
from seallmd.worker.host import Fetched, Host
from seallmd.worker.probe import probe
from seallmd.worker.resolve import eos_ids
from tests.worker.helpers import save_tiny, save_tokenizer


class Said(list[Any]):
    """What a host says, and the host."""

    def __init__(self, cache: str) -> None:
        super().__init__()
        settings = msg.WorkerSettings("host", "cpu", cache=cache)
        self.host = Host(settings, self.append, lambda item: self.host.handle(item))

    def answer(self, message: Any) -> Any:
        self.host.handle(message)
        return self.pop()


@pytest.fixture
def said(tmp_path: Path) -> Said:
    return Said(str(tmp_path / "cache"))


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content))


def remote_code(directory: Path) -> None:
    edit(
        directory / "config.json",
        model_type="never_heard_of",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (directory / "evil.py").write_text("raise SystemExit('remote code ran')")


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"never read")


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def huge_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def without_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def other_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def escaping_shard(directory: Path) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remote_code, "needs remote code"),
        (pickled, "pickled weights"),
        (cut, "model.safetensors is damaged or cut short"),
        (huge_header, "model.safetensors is damaged or cut short"),
        (without_weight, "lacks model.layers.1.mlp.up_proj.weight"),
        (other_shape, "another shape for model.norm.weight"),
        (escaping_shard, "outside the directory"),
        (missing_shard, "the shard model-00001-of-00001.safetensors is missing"),
        (no_tokenizer, "tokenizer.json"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda d: edit(d / "config.json", quantization_config={"quant_method": "fp8"}), "quantised"),
        (lambda d: edit(d / "config.json", num_attention_heads=-1), "cannot be built"),
        (lambda d: edit(d / "config.json", fusion_config={"x": 1}), "fusion_config"),
    ],
)
def test_damaged(damage: Callable[[Path], Any], reason: str, said: Said, tmp_path: Path) -> None:
    """Every way to be broken is told in one line, and the host serves the next model."""
    directory = save_tiny(tmp_path / "m")
    damage(directory)
    failed = said.answer(msg.Probe("bad", str(directory), "auto", 0))
    assert isinstance(failed, msg.ProbeFailed)
    assert reason in failed.reason
    assert "\n" not in failed.reason
    assert str(tmp_path) not in failed.reason
    shutil.rmtree(directory)
    save_tiny(directory)
    assert isinstance(said.answer(msg.Probe("good", str(directory), "auto", 0)), msg.Probed)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom is not supported"),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "gptj is not supported"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "linear_attention"),
        ("falcon_h1", {"hidden_size": 32, "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4}, ""),
        ("qwen3_next", {"hidden_size": 32, "num_hidden_layers": 4, "num_experts": 4}, "qwen3_next"),
    ],
)
def test_families_that_would_be_wrong(
    model_type: str, fields: dict[str, Any], reason: str, said: Said, tmp_path: Path
) -> None:
    """Families that keep other state than KV, or do not use the common attention, are refused."""
    config = AutoConfig.for_model(model_type, vocab_size=97, max_position_embeddings=64, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    failed = said.answer(msg.Probe("bad", str(tmp_path / "m"), "auto", 64))
    assert isinstance(failed, msg.ProbeFailed)
    assert reason in failed.reason


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("/no/such/place", "no such file"),
        ("./missing.gguf", "no such file"),
        ("has space/model", "no such file"),
        ("../no/such", "no such file"),
    ],
)
def test_references(model: str, reason: str, tmp_path: Path) -> None:
    """A reference that names nothing is told from the fetch thread, without touching the network."""
    from seallmd.errors import ModelRefused
    from seallmd.worker.resolve import fetch

    with pytest.raises(ModelRefused, match=reason):
        fetch(model, str(tmp_path), lambda *_: None)


def test_encoder_decoder(said: Said, tmp_path: Path) -> None:
    """An encoder-decoder cannot be served by a decoder's loop."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_tokenizer(tmp_path)
    failed = said.answer(msg.Probe("bad", str(tmp_path), "auto", 0))
    assert "encoder-decoder" in failed.reason


def test_image_without_probe_and_exchanged_weights(said: Said, tmp_path: Path) -> None:
    """An image fails for itself: nobody probed it, or the weights changed after the probe."""
    assert isinstance(said.answer(msg.BuildImage("ghost")), msg.ImageFailed)
    directory = save_tiny(tmp_path / "m")
    assert isinstance(said.answer(msg.Probe("s", str(directory), "auto", 0)), msg.Probed)
    other_shape(directory)
    failed = said.answer(msg.BuildImage("s"))
    assert isinstance(failed, msg.ImageFailed)
    assert "another shape" in failed.reason


def test_tied_weights_that_differ(said: Said, tmp_path: Path) -> None:
    """An output layer that differs from the embedding it is configured to share is not guessed at."""
    directory = save_tiny(tmp_path / "m", "llama tied")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    said.answer(msg.Probe("s", str(directory), "auto", 0))
    failed = said.answer(msg.BuildImage("s"))
    assert isinstance(failed, msg.ImageFailed)
    assert "tied" in failed.reason


def vocabulary_files(directory: Path) -> None:
    """What a fast tokenizer of GPT-2's kind is made from."""
    vocabulary = {f"w{i}": i for i in range(96)} | {"<|endoftext|>": 96}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def test_shape(tmp_path: Path) -> None:
    """Context, dtype and end ids follow configuration and request."""
    directory = save_tiny(tmp_path / "m")
    edit(directory / "generation_config.json", eos_token_id=[2, 40])
    shape = probe(directory, "auto", 0).shape
    assert (shape.dtype, shape.context, shape.eos, shape.vocab) == ("float32", 256, (2, 40), 97)
    assert len(shape.layers) == 4
    assert shape.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    assert all(size % 256 == 0 for size in shape.segments)
    edit(directory / "config.json", dtype="bfloat16")
    assert probe(directory, "auto", 100).shape.dtype == "bfloat16"
    assert probe(directory, "float16", 100).shape.dtype == "float16"
    assert probe(directory, "auto", 100).shape.context == 100
    assert probe(directory, "auto", 1000).shape.context == 256


def test_the_tokenizer_names_another_end(tmp_path: Path) -> None:
    """Its end of text counts beside the configuration's, whether it is one of its words or was added."""
    directory = save_tiny(tmp_path / "m")
    edit(directory / "tokenizer_config.json", eos_token="w7")
    assert eos_ids(directory) == (2, 7)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    edit(directory / "tokenizer_config.json", eos_token={"content": "<end>"})
    assert eos_ids(directory) == (2, tokenizer.token_to_id("<end>"))
    edit(directory / "tokenizer_config.json", eos_token="no such token")
    assert eos_ids(directory) == (2,)


def test_fetched_files_are_examined_in_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon is told when files are there, and says when they are examined; the next time they are looked
    for again, and may be others."""
    directory, done, said = save_tiny(tmp_path / "m"), SimpleQueue[Fetched](), list[Any]()
    monkeypatch.setattr("seallmd.worker.host.fetch", lambda *_: directory)
    host = Host(msg.WorkerSettings("host", "cpu", cache=str(tmp_path / "cache")), said.append, done.put)
    host.handle(msg.Probe("s", "some/model", "auto", 0))
    assert said == [msg.JobProgress("s", "queue", 0, 0)]
    host.handle(done.get(timeout=60))
    assert said[1:] == [msg.JobProgress("s", "fetched", 0, 0)]
    for found in (msg.Probed, msg.JobProgress):
        host.handle(msg.Probe("s", "some/model", "auto", 0))
        assert isinstance(said[-1], found), said[-1]


def test_image_is_the_same_however_it_is_read(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the files directly and through transformers gives the same bytes."""
    directory = save_tiny(tmp_path / "m")
    said.answer(msg.Probe("s", str(directory), "auto", 0))
    direct = Path(said.answer(msg.BuildImage("s")).path).read_bytes()
    said.host.handle(msg.DropImage("s"))
    monkeypatch.setattr("seallmd.worker.image.get_model_conversion_mapping", lambda _: [object()])
    assert Path(said.answer(msg.BuildImage("s")).path).read_bytes() == direct


def test_restarted_host_builds_from_what_was_probed(tmp_path: Path) -> None:
    """BuildImage names all that a host process needs which has not probed the service itself."""
    directory = save_tiny(tmp_path / "m")
    probed = Said("").answer(msg.Probe("s", str(directory), "auto", 0))
    fresh = Said("")
    ready = fresh.answer(msg.BuildImage("s", probed.directory, probed.shape.dtype, probed.shape.context))
    assert ready.bytes_ == probed.shape.weights_bytes
    assert fresh.answer(msg.BuildImage("s")).path == ready.path


def test_a_download_that_goes_on_after_its_tokenizer_was_made(said: Said, tmp_path: Path) -> None:
    """The first look at a half-copied directory must not be kept as what it holds for good."""
    directory = save_tiny(tmp_path / "m", "gpt2")
    no_tokenizer(directory)
    vocabulary_files(directory)
    weights = directory / "model.safetensors"
    later = weights.rename(tmp_path / "later")
    assert "model.safetensors" in said.answer(msg.Probe("s", str(directory), "auto", 0)).reason
    later.rename(weights)
    probed = said.answer(msg.Probe("s", str(directory), "auto", 0))
    assert isinstance(probed, msg.Probed), probed


def test_large_numbers_that_real_models_have(said: Said, tmp_path: Path) -> None:
    """The audio part of Gemma 3n and 4, which is not even served, must not be what refuses them."""
    directory = save_tiny(tmp_path / "m")
    edit(directory / "config.json", audio_config={"gradient_clipping": 1e10}, rope_theta=1e11)
    probed = said.answer(msg.Probe("s", str(directory), "auto", 0))
    assert isinstance(probed, msg.Probed), probed


def test_a_tokenizer_that_is_there_is_kept(said: Said, tmp_path: Path) -> None:
    """Without tokenizer_config.json that alone is made: the class of Qwen's tokenizers makes other ids of a
    tokenizer.json that is not Qwen's, and prompts would be wrong."""
    directory = save_tiny(tmp_path / "m", "qwen3")
    (directory / "tokenizer_config.json").unlink()
    probed = said.answer(msg.Probe("s", str(directory), "auto", 0))
    made = Path(probed.directory)
    assert (made / "tokenizer_config.json").is_file()
    assert (made / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_a_directory_that_cannot_be_looked_at(said: Said, tmp_path: Path) -> None:
    """In a home that others may not enter, for example: the loader of all other models lives on."""
    failed = said.answer(msg.Probe("s", str(tmp_path / ("m" * 300)), "auto", 0))
    assert isinstance(failed, msg.ProbeFailed)
    assert failed.reason.endswith("cannot be looked at: File name too long")


def test_missing_tokenizer_is_made(said: Said, tmp_path: Path) -> None:
    """Without tokenizer.json a fast tokenizer is made in the cache, beside links to the model's files."""
    directory = save_tiny(tmp_path / "m", "gpt2")
    no_tokenizer(directory)
    vocabulary_files(directory)
    probed = said.answer(msg.Probe("s", str(directory), "auto", 0))
    assert isinstance(probed, msg.Probed), probed
    made = Path(probed.directory)
    assert made.is_relative_to(tmp_path / "cache")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        file.name for file in made.iterdir()
    }
    assert not (directory / "tokenizer.json").exists()
    assert isinstance(said.answer(msg.BuildImage("s")), msg.ImageReady)

"""Tiny random models on disk, and a rig that drives host and worker without processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seallmd.core import messages as msg
from seallmd.core.shapes import ModelShape
from seallmd.worker import forward
from seallmd.worker.device import CpuDevice
from seallmd.worker.graphs import Recorder
from seallmd.worker.host import Host
from seallmd.worker.kv import page_of
from seallmd.worker.worker import Worker

VOCABULARY = 97
BLOCK_BYTES = 8192
GREEDY = msg.Sampling(temperature=0.0)

_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What differs from _TINY, by family; the key starts with the model type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "gpt_oss": {**_MOE, "sliding_window": 8},
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}


def save_tiny(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """Save a model of the family with weights that make attention matter, and a tokenizer."""
    model_type = family.partition(" ")[0]
    fields = {**_TINY, **FAMILIES.get(family, {}), **overrides}
    if model_type == "gpt2":
        fields = {k: v for k, v in fields.items() if k not in ("num_key_value_heads", "head_dim")}
    if model_type == "deepseek_v3":
        del fields["head_dim"]
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """One word per id."""
    words = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


def plain(directory: Path) -> PreTrainedModel:
    """The model as transformers runs it, to compare with."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, from one plain forward pass."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


class Rig:
    """Host and worker of one CPU device, called directly; `logits`: of the last step's sampling rows."""

    def __init__(
        self,
        monkeypatch: Any,
        cache: Path,
        blocks: int = 1024,
        block_bytes: int = BLOCK_BYTES,
        kv_layout: Literal["merged", "split"] = "merged",
        host_kv_bytes: int = 0,
        host_kv: tuple[str, ...] = (),
        index: int = 0,
        recorder: Recorder | None = None,
        graph_bytes: int = 1 << 30,
    ) -> None:
        self.block_bytes, self.kv_layout = block_bytes, kv_layout
        self.said: list[msg.Message] = []
        settings = msg.WorkerSettings(
            "t",
            "cpu",
            arena_bytes=blocks * block_bytes,
            block_bytes=block_bytes,
            cache=str(cache),
            host_kv_bytes=host_kv_bytes,
            host_kv=host_kv,
            index=index,
            kv_layout=kv_layout,
            graph_bytes=graph_bytes,
            rendezvous=str(cache / "rendezvous"),
        )
        self.host = Host(settings, self.said.append, lambda item: self.host.handle(item))
        self.device = CpuDevice(settings)
        self.worker = Worker(self.device, settings, self.said.append, recorder)
        self.free = list(range(blocks))
        random.Random(7).shuffle(self.free)
        self.shapes: dict[str, ModelShape] = {}
        self.sent: dict[str, msg.CopyIn] = {}
        self.steps = 0
        self.logits = torch.empty(0)
        draw = forward.sample

        def spy(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.logits = logits.clone()
            return draw(logits, *rest)

        monkeypatch.setattr(forward, "sample", spy)

    def take(self) -> Any:
        """The last thing said, progress aside; everything before it is forgotten."""
        said = [m for m in self.said if not isinstance(m, msg.JobProgress)]
        self.said.clear()
        return said[-1]

    def probe(self, service: str, directory: Path, **fields: Any) -> Any:
        """Probe and return the answer."""
        wanted = {"dtype": "auto", "context": 0, **fields}
        self.host.handle(msg.Probe(service, str(directory), **wanted))
        return self.take()

    def load(self, service: str, directory: Path, **fields: Any) -> None:
        """Probe, build the image and bring the service in."""
        probed = self.probe(service, directory, **fields)
        assert isinstance(probed, msg.Probed), probed
        self.shapes[service] = probed.shape
        self.host.handle(msg.BuildImage(service))
        ready = self.take()
        assert isinstance(ready, msg.ImageReady), ready
        self.copy_in(service, probed, ready.path)

    def coming(self, probed: msg.Probed, image: str, **fields: Any) -> msg.CopyIn:
        """The message that brings a service in, to scattered runs of blocks."""
        extents, at = [], 0
        for size in probed.shape.segments:
            extents.append(
                msg.Extent(at, size, self.take_run(-(-size // self.block_bytes)) * self.block_bytes)
            )
            at += size
        shape, given = probed.shape, {"extents": tuple(extents), **fields}
        return msg.CopyIn(
            probed.service, probed.directory, shape.dtype, shape.context, image, copy=5, **given
        )

    def copy_in(self, service: str, probed: msg.Probed, image: str) -> None:
        """Bring a service in and wait for the end."""
        self.sent[service] = copy = self.coming(probed, image)
        assert probed.service == service
        self.worker.handle(copy)
        while self.worker.copying:
            self.worker.advance()
        done = self.take()
        assert isinstance(done, msg.CopyDone), done
        assert done.copy == 5

    def evict(self, service: str) -> tuple[msg.Probed, str]:
        """Drop the weights and overwrite where they were; returns what `copy_in` needs."""
        copy = self.sent.pop(service)
        self.worker.handle(msg.DropWeights(service))
        for extent in copy.extents:
            unit = self.block_bytes
            blocks = range(extent.arena_at // unit, -(-(extent.arena_at + extent.bytes_) // unit))
            self.spoil(blocks)
            self.free += blocks
        return msg.Probed(service, copy.directory, self.shapes[service]), copy.image

    def take_run(self, length: int) -> int:
        """First of `length` neighbouring free blocks; not the first such run, so that segments scatter."""
        free = set(self.free)
        starts = [b for b in self.free if all(b + i in free for i in range(length))]
        assert starts, "the test's arena is too small"
        self.free = [b for b in self.free if not starts[0] <= b < starts[0] + length]
        return starts[0]

    def blocks(self, service: str, have: int, tokens: int) -> tuple[int, ...]:
        """New blocks for a request that has `have` and is to hold `tokens`."""
        shape = self.shapes[service]
        page = page_of(shape.layers, shape.itemsize, self.block_bytes, self.kv_layout)
        return tuple(self.free.pop() for _ in range(page.holding(tokens) * page.blocks - have))

    def spoil(self, blocks: Iterable[int]) -> None:
        """Overwrite blocks as another owner would: with bytes that are NaN in any float."""
        self.device.arena.view(-1, self.block_bytes)[list(blocks)] = 255

    def step(self, service: str, admit: list[msg.Admit], rows: list[msg.Row]) -> Any:
        """Run a step and return what the worker said."""
        self.steps += 1
        self.worker.handle(msg.Step(self.steps, service, tuple(admit), tuple(rows)))
        return self.take()


class Talk:
    """One request on a rig: keeps its tokens and compares every draw with the plain model."""

    def __init__(self, rig: Rig, request: int, service: str, prompt: list[int]) -> None:
        self.rig, self.request, self.service = rig, request, service
        self.tokens, self.prompt = list(prompt), len(prompt)
        self.run = 0
        self.table: list[int] = []
        self.admitted = False

    def row(self, count: int) -> tuple[list[msg.Admit], msg.Row]:
        """The next `count` tokens, sampling where they are the last."""
        told = 0 if GREEDY.pooling else 1
        admits = msg.Admit(self.request, tuple(self.tokens), self.prompt, GREEDY, told)
        admit = [] if self.admitted else [admits]
        self.admitted = True
        blocks = self.rig.blocks(self.service, len(self.table), self.run + count)
        self.table += blocks
        sample = self.run + count == len(self.tokens) and not GREEDY.pooling
        row = msg.Row(self.request, self.run, count, sample, blocks)
        self.run += count
        return admit, row

    def restart(self) -> None:
        """Preempted: the KV is gone, prompt and output are run again."""
        self.rig.worker.handle(msg.Forget((self.request,)))
        self.rig.free += self.table
        self.run, self.table, self.admitted = 0, [], False


def run_step(rig: Rig, model: PreTrainedModel, work: list[tuple[Talk, int]]) -> None:
    """One step of these rows; logits and tokens must be the plain model's."""
    admits, rows = [], []
    for talk, count in work:
        admit, row = talk.row(count)
        admits += admit
        rows.append(row)
    done = rig.step(work[0][0].service, admits, rows)
    assert isinstance(done, msg.StepDone), done
    drawn = iter(zip(done.tokens, rig.logits, strict=True)) if done.tokens else iter(())
    for (talk, _), row in zip(work, rows, strict=True):
        if row.sample:
            token, logits = next(drawn)
            expected = plain_logits(model, talk.tokens)
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
            assert token == int(expected.argmax())
            talk.tokens.append(token)

"""Whether a model can be served correctly, and its shape.

Owns the gate. A model is not judged by its family's name but by what it does: it is loaded on the meta
device and runs three tokens with an attention function that records. Names are refused only where a family
is known to pass this test and still compute something else. Must not know images or arenas.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from seallmd.core.shapes import LayerShape, ModelShape, Shard
from seallmd.errors import ModelRefused
from seallmd.worker import quantised
from seallmd.worker.attention import NAME, LayerCall, run_recorded
from seallmd.worker.checkpoint import Checkpoint
from seallmd.worker.layout import Layout, layout_of_rank
from seallmd.worker.parallel import MAX_RANKS, Indivisible, divide, sit
from seallmd.worker.process import one_line
from seallmd.worker.resolve import eos_ids
from seallmd.worker.skeleton import DTYPES, build_skeleton, fix_rope, ignore_padding, load_config

_REFUSED = {
    "bloom": "its attention adds a position bias of its own (ALiBi)",
    "mpt": "its attention adds a position bias of its own (ALiBi)",
    "falcon": "its attention may add a position bias of its own (ALiBi)",
    "gptj": "its attention is not transformers' common one",
    "llama4": "its chunked attention is not told to the attention function",
    "llama4_text": "its chunked attention is not told to the attention function",
    "qwen3_next": "it keeps linear-attention state besides KV",
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Probed:
    """A model that can be served. dtype: of its KV, and of the weights of `skeleton`.

    in_blocks: whether the weights are quantised, and laid out so; the skeleton is not.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    dtype: torch.dtype
    skeleton: PreTrainedModel
    layout: Layout
    shape: ModelShape
    in_blocks: bool = False


def probe(directory: Path, dtype: str, context: int) -> Probed:
    """Examine a complete model directory.

    dtype and context as in `messages.Probe`. Raises ModelRefused with the reason.
    """
    checkpoint = Checkpoint(directory)
    config = load_config(directory)
    if reason := _REFUSED.get(config.model_type):
        raise ModelRefused(f"{config.model_type} is not supported: {reason}")
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= _LAYER_TYPES:
        raise ModelRefused(f"layers of type {', '.join(sorted(kinds - _LAYER_TYPES))} are not supported")
    limit = _context(config, context)
    resolved, in_blocks = _dtype(config, checkpoint, dtype), dtype == quantised.NAME
    try:
        rehearsed, calls, vocabulary = _rehearse(directory, config, limit)
        skeleton = build_skeleton(config, resolved, torch.device("cpu"))
        layout = layout_of_rank(skeleton, 1, in_blocks)
    except ModelRefused:
        raise
    except Exception as error:
        raise ModelRefused(f"its module cannot be built or run: {one_line(error)}") from error
    _check_calls(calls, config)
    shape = ModelShape(
        architecture=type(skeleton).__name__,
        dtype=quantised.NAME if in_blocks else str(resolved).removeprefix("torch."),
        itemsize=resolved.itemsize,
        layers=_layers(calls),
        segments=layout.segments,
        vocab=vocabulary,
        context=limit,
        eos=eos_ids(directory),
        shards=_shards(rehearsed, skeleton, _layers(calls), in_blocks),
        hidden=rehearsed.get_output_embeddings().weight.shape[1],
        weight_itemsize=quantised.WEIGHT_BYTES if in_blocks else 0.0,
    )
    return Probed(checkpoint, config, resolved, skeleton, layout, shape, in_blocks)


def _rehearse(
    directory: Path, config: PreTrainedConfig, context: int
) -> tuple[PreTrainedModel, list[LayerCall], int]:
    """Load on the meta device, so that names and shapes are checked without reading weights, and run.

    Returns the model, its attention calls, and the rows of its output layer.
    """
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        directory,
        config=config,
        # bfloat16 whatever the service uses: grouped expert kernels refuse float32 on meta.
        dtype=torch.bfloat16,
        device_map="meta",
        attn_implementation=NAME,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are told below
        output_loading_info=True,
    )
    check_loaded(info)
    ignore_padding(model)
    fix_rope(model, context)  # what it replaces looks at the data, which meta tensors have not
    if getattr(model, "_is_stateful", False) or any(isinstance(m, nn.Conv1d) for m in model.modules()):
        raise ModelRefused(f"{config.model_type} keeps recurrent state besides KV")
    calls, logits = run_recorded(model, tokens=3)
    return model, calls, logits.shape[-1]


def _layers(calls: list[LayerCall]) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(call.kv_heads, call.k_dim, call.v_dim) for call in calls)


def _shards(
    rehearsed: PreTrainedModel, skeleton: PreTrainedModel, whole: tuple[LayerShape, ...], in_blocks: bool
) -> tuple[Shard, ...]:
    """How the model can be split. whole: KV of its layers on one device. in_blocks: as in `Probed`.

    As above, what counts is that it runs. A run takes some 0.1 s, and what runs with eight parts has heads
    for four and two: only numbers of ranks that divide none of those that ran are run themselves.
    """
    ran: dict[int, tuple[LayerShape, ...]] = {}
    shards = []
    for ranks in range(MAX_RANKS, 1, -1):
        try:
            divide(skeleton, 0, ranks)
            more = next((more for more in ran if more % ranks == 0), None)
            if more is None:
                ran[ranks] = layers = _rehearse_rank(rehearsed, whole, ranks)
            else:
                layers = tuple(map(_merged, whole, ran[more], [ranks] * len(whole)))
            shards.append(Shard(ranks, layers, layout_of_rank(skeleton, ranks, in_blocks).segments))
        except Exception:  # noqa: BLE001 - what cannot be divided, or does not run in parts, is served whole
            continue
    return tuple(reversed(shards))


def _rehearse_rank(
    rehearsed: PreTrainedModel, whole: tuple[LayerShape, ...], ranks: int
) -> tuple[LayerShape, ...]:
    """KV of each layer on one of `ranks` ranks, as a run shows it."""
    tree = copy.deepcopy(rehearsed)
    sit(tree, divide(tree, 0, ranks))
    layers = _layers(run_recorded(tree, tokens=3)[0])
    for one, part in zip(whole, layers, strict=True):
        divided = LayerShape(max(1, one.kv_heads // ranks), one.k_dim, one.v_dim)
        if part not in (one, divided):  # a plan may leave attention, and its KV, whole
            raise Indivisible("its KV is not divided by heads")
    return layers


def _merged(one: LayerShape, part: LayerShape, ranks: int) -> LayerShape:
    """KV of a layer on one of fewer ranks. one: without division; part: with more ranks."""
    return one if part == one else LayerShape(max(1, one.kv_heads // ranks), one.k_dim, one.v_dim)


def check_loaded(info: Mapping[str, Any]) -> None:
    """Raise ModelRefused if transformers could not fill every weight from the checkpoint."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        entries = info.get(key) or ()  # names, or (name, shape found, shape expected)
        found = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in entries)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelRefused(f"the checkpoint {what} {found[0]}{more}")
    if errors := info.get("error_msgs"):
        raise ModelRefused(f"the checkpoint cannot be loaded: {str(errors)[:200]}")


def _check_calls(calls: list[LayerCall], config: PreTrainedConfig) -> None:
    layers = config.num_hidden_layers
    if [call.layer for call in calls] != list(range(layers)):
        raise ModelRefused(
            f"{config.model_type} is not supported: {len(calls)} attention calls for {layers} layers"
        )
    kinds = getattr(config, "layer_types", None) or [None] * layers
    for call, kind in zip(calls, kinds, strict=False):
        if call.bidirectional:
            raise ModelRefused(f"{config.model_type} is not supported: its attention is not causal")
        if call.unknown:
            raise ModelRefused(f"{config.model_type} is not supported: attention with {call.unknown[0]}")
        if kind == "sliding_attention" and call.window is None:
            raise ModelRefused(f"{config.model_type} is not supported: its window is not told")


def _context(config: PreTrainedConfig, wanted: int) -> int:
    own = getattr(config, "max_position_embeddings", None) or 0
    if not own and not wanted:
        raise ModelRefused("the model names no context limit; set `context` for the service")
    return min(own, wanted) if own and wanted else own or wanted


def _dtype(config: PreTrainedConfig, checkpoint: Checkpoint, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    own = config.dtype or checkpoint.dtype() or torch.float32
    if isinstance(own, str):
        own = getattr(torch, own)
    return own if own in DTYPES.values() else torch.bfloat16

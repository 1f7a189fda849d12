"""The module tree of a model without its weights.

Owns how a transformers configuration becomes a tree with parameters on the meta device and real small
buffers; host and workers build it the same way, so both derive the same layout from it. Must not know
arenas, images or requests.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from seallmd.errors import ModelRefused
from seallmd.worker import quantised
from seallmd.worker.attention import NAME
from seallmd.worker.process import one_line

# Of a service's KV, and of its weights; some of these are quantised afterwards where its dtype says so.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    quantised.NAME: quantised.REST_DTYPE,
}


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration of the text model in `directory`, and its module imported.

    Of a multimodal model only the text part is meant. Slow (it imports the model's module) and safe in any
    thread. Raises ModelRefused where no native causal language model exists for it.
    """
    try:
        whole = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        if b'"auto_map"' in (directory / "config.json").read_bytes():
            raise ModelRefused("it needs remote code (auto_map), which is never run") from error
        raise ModelRefused(f"its config.json cannot be used: {one_line(error)}") from error
    if whole.is_encoder_decoder:
        raise ModelRefused(f"{whole.model_type} is an encoder-decoder model")
    config = copy.deepcopy(whole.get_text_config())
    for part in (whole, config):
        if getattr(part, "quantization_config", None) or getattr(part, "compression_config", None):
            raise ModelRefused("quantised checkpoints cannot be served; use the unquantised one or a GGUF")
        if getattr(part, "fusion_config", None):
            raise ModelRefused("its config.json asks for changes to the model's code (fusion_config)")
    config._experts_implementation = None  # a name here could be code to fetch; the default is ours to choose
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelRefused(f"{whole.model_type} has no causal language model in transformers")
    _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return config


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode: parameters on meta, buffers that no checkpoint holds real on `device`.

    Main thread only, between steps (some 15 ms once the module is imported): while the tree is built,
    torch's default dtype, which is process-wide, is `dtype`, and a step running beside it would see that.
    """
    config = copy.deepcopy(config)  # the attention's name is stored on it: never shared between models
    # To initialise parameters on meta gives nothing, and took 70 of 80 ms in which no resident could step.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=NAME, trust_remote_code=False
        )
    ignore_padding(model)
    model.tie_weights()  # init_empty_weights replaced every parameter by its own, tied ones too
    _keep_in_float32(model, dtype)
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval().requires_grad_(False)


def ignore_padding(model: PreTrainedModel) -> None:
    """Switch off a warning: nothing is ever padded here, and looking for it would wait for the device."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _no_warning


def _no_warning(*_: object) -> None:
    pass


def fix_rope(model: PreTrainedModel, context: int) -> None:
    """Make rotary frequencies independent of the batch.

    Dynamic and LongRoPE choose frequencies by the largest position of the whole packed batch, so a long
    request would change what its neighbours compute. Here they are fixed for `context` tokens.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if _is_dynamic(kinds):
                _fix(module, kinds, None, context)
                module.rope_type = "default"
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if _is_dynamic(kind):
                    _fix(module, kind, layer_type, context)
                    module.rope_type = {**module.rope_type, layer_type: "default"}


def _is_dynamic(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _fix(module: nn.Module, kind: str, layer_type: str | None, context: int) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    old = getattr(module, f"{prefix}inv_freq")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, torch.device("cpu"), seq_len=context, layer_type=layer_type
    )
    setattr(module, f"{prefix}inv_freq", nn.Buffer(frequencies.to(old.device), persistent=False))
    setattr(module, f"{prefix}attention_scaling", scaling)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Apply the model's own list of parameters that stay float32, as `from_pretrained` does."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)

"""Whether a model's small files can be what they say, before anything is built from them.

Owns bounds that no real model comes near and a lying one would use to fill memory or time: building a module
tree costs per layer and per expert, even on the meta device. Must not know families.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from seallmd.errors import ModelRefused

_LARGEST_FILES = {
    "config.json": 4 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 64 << 20,
    "tokenizer.json": 512 << 20,
    "model.safetensors.index.json": 256 << 20,
}
# Gemma's audio parts clip gradients at 1e10, and rotations of long contexts have bases up to 1e11.
_LARGEST_NUMBER = 10**12
# Largest values by the end of a field's name; the first match counts.
_LARGEST = (
    (re.compile(r"(num_hidden_layers|num_layers|n_layers?)$"), 1024),
    (re.compile(r"experts(_per_tok)?$"), 4096),
    (re.compile(r"(heads|n_head)$"), 4096),
    (re.compile(r"(position_embeddings|n_positions|n_ctx|seq_length)$"), 1 << 28),
    (re.compile(r"(_size|n_embd|_dim|_rank)$"), 1 << 24),
)


def check_files(directory: Path) -> None:
    """Raise ModelRefused with the reason when a file of a model's directory cannot be a real model's."""
    for name, largest in _LARGEST_FILES.items():
        file = directory / name
        if file.exists() and not file.is_file():
            raise ModelRefused(f"{name} is no file")
        if file.is_file() and file.stat().st_size > largest:
            raise ModelRefused(
                f"{name} has {file.stat().st_size >> 20} MiB, at most {largest >> 20} are read"
            )
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except OSError:
        return  # told by who needs it
    except (ValueError, RecursionError) as error:
        raise ModelRefused("its config.json is no JSON") from error
    _check(config, "config.json")


def _check(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _check(entry, str(key)[:60])
    elif isinstance(value, list):
        for entry in value:
            _check(entry, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        largest = next((limit for pattern, limit in _LARGEST if pattern.search(name)), _LARGEST_NUMBER)
        if not -_LARGEST_NUMBER <= value <= largest:
            raise ModelRefused(f"its config.json says {name} = {value:.4g}, which no model has")

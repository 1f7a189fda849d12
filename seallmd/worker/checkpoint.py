"""The files of a model directory.

Owns what makes a directory usable: configuration, safetensors that are whole, no pickles. Must not know how
models are built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from seallmd.errors import ModelRefused
from seallmd.worker.process import one_line

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The weights of a directory; opening it reads every header and checks it against its file's size.

    Raises ModelRefused with the reason.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "config.json").is_file():
            raise ModelRefused("the directory has no config.json")
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        for file in _weight_files(directory):
            try:
                with safe_open(file, framework="pt") as tensors:
                    self._file_of.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ModelRefused(f"{file.name} is damaged or cut short ({one_line(error)})") from error
        if not self._file_of:
            raise ModelRefused("the checkpoint holds no tensors")

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    @property
    def files(self) -> list[Path]:
        """What the weights depend on: the files that hold them, and the configuration."""
        return [self.directory / "config.json", *sorted(set(self._file_of.values()))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def dtype(self) -> torch.dtype | None:
        """Dtype of the first floating-point weight, None if there is none."""
        for name, file in self._file_of.items():
            with safe_open(file, framework="pt") as tensors:
                dtype = tensors.get_slice(name)[:0].dtype if tensors.get_slice(name).get_shape() else None
            if dtype is not None and dtype.is_floating_point:
                return dtype
        return None

    def read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one after the other, file by file; each is a view of a mapped file."""
        for file in sorted(set(self._file_of.values())):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.offset_keys():
                    if name in names:
                        yield name, tensors.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    if (directory / _INDEX).exists():
        return _shards(directory)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise ModelRefused(
            "only pickled weights (.bin) were found, which are never loaded; safetensors are needed"
        )
    raise ModelRefused(f"the directory has neither {_SINGLE} nor {_INDEX}")


def _shards(directory: Path) -> list[Path]:
    try:
        names = set(json.loads((directory / _INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelRefused(f"{_INDEX} cannot be read") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelRefused(f"{_INDEX} names a file outside the directory")
        if not (directory / name).is_file():
            raise ModelRefused(f"the shard {name} is missing")
    return [directory / name for name in sorted(names)]

"""The host image: all weights of a service, flattened in shared memory.

Owns its making. Workers map it through this process's descriptor table, so it lives as long as this process
or a mapping does. Must not know who asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from seallmd.errors import ModelRefused
from seallmd.worker.attention import NAME
from seallmd.worker.layout import Place
from seallmd.worker.probe import Probed, check_loaded
from seallmd.worker.process import require_memory


class Image:
    """An anonymous file with the weights of `probed`. Raises ModelRefused or MemoryError.

    progress: called with (bytes done, bytes in all).
    """

    def __init__(self, service: str, probed: Probed, progress: Callable[[int, int], None]) -> None:
        self.model = probed
        self.bytes_ = probed.layout.bytes_
        require_memory(self.bytes_, "the host image")
        self._fd = os.memfd_create(f"seallmd-{service}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, self.bytes_)  # an error now rather than SIGBUS while writing
            memory = torch.from_file(self.path, shared=True, size=self.bytes_, dtype=torch.uint8)
            _fill(memory, probed, progress)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """Where any process of this user can open it while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give the memory back once no worker maps it."""
        os.close(self._fd)


def _fill(memory: torch.Tensor, probed: Probed, progress: Callable[[int, int], None]) -> None:
    total, done = memory.numel(), 0
    places = {name: place for place in probed.layout.places for name in place.names}
    missing = set(probed.layout.places)
    for name, tensor in _weights(probed, places):
        place = places[name]
        target = memory[place.at : place.at + place.bytes_].view(place.dtype).view(place.shape)
        if tensor.shape != place.shape:  # the files were exchanged since the probe
            raise ModelRefused(f"the checkpoint has another shape for {name}")
        if place in missing:
            target.copy_(tensor)
            missing.remove(place)
            done += place.bytes_
            progress(done, total)
        elif not torch.equal(target, tensor.to(place.dtype)):
            raise ModelRefused(
                f"{name} is tied to {place.names[0]} by the configuration, but differs from it"
            )
    if missing:
        raise ModelRefused(f"the checkpoint lacks {min(place.names[0] for place in missing)}")
    progress(total, total)


def _weights(probed: Probed, places: dict[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor), straight from the files where nothing has to be renamed or merged."""
    checkpoint = probed.checkpoint
    transforms = get_model_conversion_mapping(probed.skeleton)
    stored = checkpoint.names & set(places)
    whole = all(any(name in stored for name in place.names) for place in probed.layout.places)
    if whole and all(isinstance(transform, WeightRenaming) for transform in transforms):
        yield from checkpoint.read(stored)
        return
    # transformers does the renaming and merging, at the cost of a second copy in memory for a while.
    require_memory(probed.layout.bytes_, "reading the checkpoint")
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(probed.config)].from_pretrained(
        checkpoint.directory,
        config=probed.config,
        dtype=probed.dtype,
        attn_implementation=NAME,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    check_loaded(info)
    yield from model.state_dict().items()

"""The host image: all weights of a service, flattened in shared memory, one part for each rank.

Owns its making, and what it is made from, by which the cache on disk knows it. Workers map it through this
process's descriptor table, so it lives as long as this process or a mapping does. Must not know who asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from typing import NamedTuple

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from seallmd.errors import ModelRefused
from seallmd.worker.attention import NAME
from seallmd.worker.image_cache import ImageCache
from seallmd.worker.layout import Layout, Place, layout_of_rank
from seallmd.worker.parallel import Cut, Indivisible, divide
from seallmd.worker.probe import Probed, check_loaded
from seallmd.worker.process import require_memory
from seallmd.worker.quantised import SCHEME, WEIGHT_DTYPE, Blocks

_VERSION = 1  # to be raised when the same files come to give other bytes


class Image:
    """A file with the weights of `probed`: one of the cache, or an anonymous one, which the cache then keeps.

    Raises ModelRefused or MemoryError. ranks: tensor-parallel ranks; the r-th of as many equal parts is rank
    r's, in the layout of its tree. progress: called with (bytes done, bytes in all).
    """

    def __init__(
        self,
        service: str,
        probed: Probed,
        ranks: int,
        progress: Callable[[int, int], None],
        cache: ImageCache | None = None,
    ) -> None:
        self.model, self.ranks = probed, ranks
        try:
            parts = _parts(probed, ranks)
        except Indivisible as error:
            raise ModelRefused(f"it cannot be split over {ranks} devices: {error}") from error
        self.bytes_ = sum(part.layout.bytes_ for part in parts)
        self.keeping: Thread | None = None  # what writes it to the cache
        if cache is None:
            self._build(service, parts, progress)
            return
        made_from = _made_from(probed, parts)
        found = cache.find(made_from, self.bytes_, progress)
        if found is not None:
            self._fd = found
        else:
            self._build(service, parts, progress)
            self.keeping = cache.keep(made_from, self._fd, self.bytes_)

    def _build(self, service: str, parts: list[_Part], progress: Callable[[int, int], None]) -> None:
        require_memory(self.bytes_, "the host image")
        self._fd = os.memfd_create(f"seallmd-{service}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, self.bytes_)  # an error now rather than SIGBUS while writing
            memory = torch.from_file(self.path, shared=True, size=self.bytes_, dtype=torch.uint8)
            _fill(memory, self.model, parts, progress)
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


class _Part(NamedTuple):
    """One rank's part. at: its first byte. cuts: of the weights that are divided."""

    at: int
    layout: Layout
    cuts: dict[str, Cut]

    def of(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What the part holds of a weight."""
        cut = self.cuts.get(name)
        return whole if cut is None else cut.of(whole)


def _parts(probed: Probed, ranks: int) -> list[_Part]:
    if ranks == 1:
        return [_Part(0, probed.layout, {})]
    layout = layout_of_rank(probed.skeleton, ranks, probed.in_blocks)
    divisions = [divide(probed.skeleton, rank, ranks) for rank in range(ranks)]
    return [_Part(d.rank * layout.bytes_, layout, d.cuts) for d in divisions]


def _made_from(probed: Probed, parts: list[_Part]) -> object:
    """All that an image's bytes depend on: files, the layout, and the library that renames and merges."""
    files = [(str(file.resolve()), file.stat()) for file in probed.checkpoint.files]
    return {
        "version": (_VERSION, SCHEME) if probed.in_blocks else _VERSION,
        "files": [(path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in files],
        "transformers": transformers.__version__,
        "places": [
            (part.at, [(*place[:4], str(place.dtype)) for place in part.layout.places]) for part in parts
        ],
    }


def _fill(
    memory: torch.Tensor, probed: Probed, parts: list[_Part], progress: Callable[[int, int], None]
) -> None:
    """Copy every weight to its places. Tensors come as views of mapped files, so that a rank's slice is read
    straight from there, and each file once, whatever the number of ranks."""
    total, done = memory.numel(), 0
    shapes = {name: tensor.shape for name, tensor in probed.skeleton.state_dict().items()}
    places = [{name: place for place in part.layout.places for name in place.names} for part in parts]
    written: set[int] = set()  # places, by their first byte in the image
    for name, tensor in _weights(probed, shapes):
        if tensor.shape != shapes[name]:  # the files were exchanged since the probe
            raise ModelRefused(f"the checkpoint has another shape for {name}")
        for part, of_part in zip(parts, places, strict=True):
            own = _places_of(name, of_part)
            targets = [_room(memory, part.at, place) for place in own]
            held = part.of(name, tensor)
            if part.at + own[0].at not in written:
                _store(held, targets)
                written.update(part.at + place.at for place in own)
                done += sum(place.bytes_ for place in own)
                progress(done, total)
            elif not _holds(targets, held):
                raise ModelRefused(
                    f"{name} is tied to {own[0].names[0]} by the configuration, but differs from it"
                )
    missing = [place for place in parts[0].layout.places if place.at not in written]
    if missing:
        raise ModelRefused(f"the checkpoint lacks {min(place.names[0] for place in missing)}")
    progress(total, total)


def _places_of(name: str, places: dict[str, Place]) -> list[Place]:
    """Where a weight of the checkpoint goes: to one place, or in blocks to two (see `quantised.Blocks`)."""
    place = places[name]
    if place.dtype is not WEIGHT_DTYPE:
        return [place]
    return [place, places[f"{name.removesuffix('weight')}scale"]]


def _room(memory: torch.Tensor, part_at: int, place: Place) -> torch.Tensor:
    at = part_at + place.at
    return memory[at : at + place.bytes_].view(place.dtype).view(place.shape)


def _store(held: torch.Tensor, targets: list[torch.Tensor]) -> None:
    if len(targets) == 1:
        targets[0].copy_(held)
    else:
        Blocks(targets[0], targets[1], *held.shape).fill(held)


def _holds(targets: list[torch.Tensor], held: torch.Tensor) -> bool:
    """Whether it is what was stored already."""
    again = [torch.empty_like(target) for target in targets]
    _store(held, again)
    return all(map(torch.equal, targets, again))


def _weights(probed: Probed, wanted: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor), straight from the files where nothing has to be renamed or merged."""
    checkpoint = probed.checkpoint
    transforms = get_model_conversion_mapping(probed.skeleton)
    stored = checkpoint.names & set(wanted)
    # Scales are in no checkpoint.
    needed = [place.names for place in probed.layout.places if wanted.keys() >= set(place.names)]
    whole = all(any(name in stored for name in names) for names in needed)
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

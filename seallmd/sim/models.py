"""Shapes of known models, and rooflines of sets of devices, by name.

Owns the table of models and the words of the command line for models ("12*llama-7b") and devices
("2*h100"). Must not know workloads. Shapes follow from published configurations; nothing is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from seallmd.core.cost import ROOFLINES, Roofline
from seallmd.core.shapes import LayerShape, ModelShape, Shard
from seallmd.errors import SeallmdError

_SMALL_BLOCK, _LARGE_BLOCK = 512 << 10, 2 << 20
_BLOCKS = 4096  # that an arena should have for large blocks to be worth it
_LEAST_BLOCK_TOKENS = 4
CONTEXT_TOKENS = 16384  # longer than what the older models were trained for: production prompts are long


class SimError(SeallmdError):
    """What was asked of the simulator cannot be done; one line."""


@dataclass(frozen=True)
class Decoder:
    """A decoder with gated feed-forward layers, as its configuration file describes it.

    ffn: width of the feed-forward layers. tied: the output layer is the embedding. norms: vectors of width
    `hidden` per layer.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: str = "float16"
    tied: bool = False
    norms: int = 2

    def shape(self, context: int = CONTEXT_TOKENS) -> ModelShape:
        """Weights segments (embedding, each layer, last norm, output layer) and KV layers."""
        itemsize = 4 if self.dtype == "float32" else 2
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + self.norms * self.hidden
        embedding = self.vocab * self.hidden
        segments = [embedding, *[layer] * self.layers, self.hidden, *[embedding] * (not self.tied)]
        bytes_ = tuple(count * itemsize for count in segments)
        shards = tuple(
            Shard(ranks, (self._kv(ranks),) * self.layers, tuple(size // ranks for size in bytes_))
            for ranks in _RANKS
            if self.kv_heads % ranks == 0
        )
        layers = (self._kv(1),) * self.layers
        return ModelShape("sim", self.dtype, itemsize, layers, bytes_, self.vocab, context, shards=shards)

    def _kv(self, ranks: int) -> LayerShape:
        return LayerShape(self.kv_heads // ranks, self.head_dim, self.head_dim)


_RANKS = (2, 4, 8)  # of tensor-parallel groups

MODELS = {
    "llama-7b": Decoder(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-13b": Decoder(40, 5120, 40, 40, 128, 13824, 32000),
    "llama-30b": Decoder(60, 6656, 52, 52, 128, 17920, 32000),
    "llama-65b": Decoder(80, 8192, 64, 64, 128, 22016, 32000),
    "llama-3.1-8b": Decoder(32, 4096, 32, 8, 128, 14336, 128256, "bfloat16"),
    "smollm2-135m": Decoder(30, 576, 9, 3, 64, 1536, 49152, "float32", tied=True),
    "gemma-3-270m": Decoder(18, 640, 4, 1, 256, 2048, 262144, "float32", tied=True, norms=4),
}

PRESETS = {
    "muxserve": "12*llama-7b,4*llama-13b,2*llama-30b,1*llama-65b",  # the mix of its evaluation
    "small": "4*llama-7b,2*llama-13b",
    "cpu": "2*smollm2-135m,1*gemma-3-270m",  # the models that this project's tests use
}


def parse_models(text: str, context: int = CONTEXT_TOKENS) -> dict[str, ModelShape]:
    """Services and their shapes, from a preset's name or "COUNT*MODEL,SERVICE=MODEL,...". Raises SimError.

    Services without a name are called after their models, and numbered.
    """
    services: dict[str, ModelShape] = {}
    numbers: Counter[str] = Counter()
    for words, count in _counted(PRESETS.get(text, text)):
        service, named, name = words.rpartition("=")
        if name not in MODELS:
            raise SimError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
        for _ in range(count):
            numbers[name] += 1
            services[service if named else f"{name}-{numbers[name]}"] = MODELS[name].shape(context)
    return services


def parse_devices(text: str) -> tuple[Roofline, ...]:
    """Devices from "COUNT*KIND:N@GIB,...": N act as one and have GIB of memory. Raises SimError."""
    devices: list[Roofline] = []
    for words, count in _counted(text):
        name, at, gib = words.partition("@")
        kind, _, size = name.partition(":")
        if kind not in ROOFLINES:
            raise SimError(f"no device is called {kind!r}; there are {', '.join(ROOFLINES)}")
        device = grouped(ROOFLINES[kind], _positive(size or "1"))
        if at:
            device = msgspec.structs.replace(device, memory_bytes=_positive(gib) << 30)
        devices += [device] * count
    return tuple(devices)


def block_bytes_for(devices: Sequence[Roofline], shapes: Iterable[ModelShape]) -> int:
    """A block size as the daemon's default (512 KiB on small devices, 2 MiB), or as large models need it."""
    smallest = min(device.memory_bytes for device in devices)
    token = max(shape.kv_bytes_per_token for shape in shapes)
    block = _LARGE_BLOCK if smallest >= _BLOCKS * _LARGE_BLOCK else _SMALL_BLOCK
    while block < _LEAST_BLOCK_TOKENS * token:
        block *= 2
    return block


def grouped(device: Roofline, size: int) -> Roofline:
    """`size` devices that hold every model in equal parts (tensor parallelism); its messages cost nothing."""
    if size == 1:
        return device
    return msgspec.structs.replace(
        device,
        name=f"{device.name}:{size}",
        flops=device.flops * size,
        bytes_per_second=device.bytes_per_second * size,
        copy_bytes_per_second=device.copy_bytes_per_second * size,
        memory_bytes=device.memory_bytes * size,
    )


def _counted(text: str) -> list[tuple[str, int]]:
    """ "2*a,b" -> [("a", 2), ("b", 1)]."""
    found = []
    for part in text.split(","):
        count, star, name = part.strip().rpartition("*")
        found.append((name, _positive(count) if star else 1))
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise SimError(f"{text!r} is no positive number")
    return int(text)

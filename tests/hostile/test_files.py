"""Model files that lie: refused by what they say, before memory or time is spent on it.

SECURITY.md says which known holes of other servers each test stands for.
"""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seallmd.core import messages as msg
from seallmd.errors import ModelRefused
from seallmd.worker.gguf_check import check_gguf
from seallmd.worker.host import Host
from tests.worker.helpers import save_tiny

Damage = Callable[[Path], object]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What is lied into being would need more than 2 GiB beyond what there is now."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, ((int(data.split()[1]) << 10) + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def edit(**fields: object) -> Damage:
    """Change config.json."""

    def damage(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


def tensors(header: dict[str, Any] | bytes, data: bytes = bytes(64), length: int | None = None) -> Damage:
    """Write a safetensors file with this header."""

    def damage(directory: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)

    return damage


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def remote_code(directory: Path) -> None:
    """A module beside the weights that says so when it is run."""
    edit(model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(directory)
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w').close()\n")


def outside(directory: Path) -> None:
    """A shard by an absolute path."""
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "/etc/passwd"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [
        tensors({}, length=1 << 62),
        tensors({}, length=(1 << 64) - 1),
        tensors(b"{" * 100_000),
        tensors({"a": tensor([1 << 40, 1 << 20], [0, 64])}),
        tensors({"a": tensor([16], [0, 1 << 50])}),
        tensors({"a": tensor([16], [0, 64]), "b": tensor([16], [0, 64])}),
        tensors({"a": tensor([16], [64, 0])}),
        tensors({"a": tensor([-16], [0, 64])}),
        tensors({"a": tensor([16], [0, 64], "PICKLE")}),
        tensors({"a": tensor([], [0, 64])}),
        tensors(b""),
        tensors({"a": tensor([1 << 32] * 4, [0, 64])}),
        edit(num_hidden_layers=10**9),
        edit(num_hidden_layers=1e18),
        edit(hidden_size=1 << 60),
        edit(vocab_size=1 << 40),
        edit(intermediate_size=-1),
        edit(max_position_embeddings=1 << 50),
        edit(num_attention_heads=0),
        edit(model_type="mixtral", num_local_experts=1 << 30),
        edit(rope_scaling={"rope_type": "dynamic", "factor": 1e300}),
        edit(rope_scaling={"rope_type": "__import__('os')"}),
        edit(architectures=["os.system"], model_type="../../evil"),
        lambda d: (d / "config.json").write_bytes(b"[" * 100_000),
        lambda d: (d / "config.json").write_bytes(b" " * (5 << 20) + b"{}"),
        lambda d: (d / "tokenizer.json").write_bytes(b'{"model":' * 10_000),
        lambda d: (d / "tokenizer.json").write_bytes(random.Random(1).randbytes(10_000)),
        remote_code,
        outside,
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_lying_files(damage: Damage, tmp_path: Path) -> None:
    """One short line without a path, no code is run, and the next model is served."""
    said: list[msg.Message] = []
    host = Host(msg.WorkerSettings("host", "cpu", cache=str(tmp_path / "cache")), said.append, lambda _: None)
    directory = save_tiny(tmp_path / "m")
    damage(directory)
    host.handle(msg.Probe("bad", str(directory), "auto", 0))
    (failed,) = said
    assert isinstance(failed, msg.ProbeFailed), failed
    assert len(failed.reason) <= 400
    assert "\n" not in failed.reason
    assert str(tmp_path) not in failed.reason
    assert not (directory / "ran").exists()
    said.clear()
    host.handle(msg.Probe("good", str(save_tiny(tmp_path / "good")), "auto", 0))
    assert isinstance(said[0], msg.Probed)


# ------------------------------------------------------------------------------------------- GGUF


def text(value: str) -> bytes:
    """A string of a GGUF file."""
    return struct.pack("<Q", len(value)) + value.encode()


def pair(name: str, kind: int, value: bytes) -> bytes:
    """A key-value pair of a GGUF file."""
    return text(name) + struct.pack("<I", kind) + value


def info(shape: tuple[int, ...] = (32, 4), kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    """A tensor's entry; 512 bytes of data belong to it."""
    rank = len(shape) if rank is None else rank
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text("t") + struct.pack("<I", rank) + dims + struct.pack("<IQ", kind, offset)


def gguf(
    *parts: bytes, tensors: int = 1, pairs: int = 0, version: int = 3, data: bytes = bytes(600)
) -> bytes:
    """A file of these parts."""
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + b"".join(parts) + data


NAMES = pair("general.name", 8, text("x"))
ARRAY = pair("a", 9, struct.pack("<IQ", 4, 3) + bytes(12))


def test_honest_gguf_files_pass(tmp_path: Path) -> None:
    """Else all the refusals below would prove nothing."""
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf(NAMES, ARRAY, info(), pairs=2))
    check_gguf(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(100),
        gguf(info(), version=9),
        gguf(info(), tensors=1 << 60),
        gguf(info(), tensors=0),
        gguf(info(), pairs=1 << 63),
        gguf(NAMES, info(), tensors=2, pairs=1, data=b""),
        gguf(text("x" * 100)[:8] + b"x", pairs=1),
        gguf(struct.pack("<Q", 1 << 62), pairs=1),
        gguf(pair("a", 8, struct.pack("<Q", 1 << 62)), info(), pairs=1),
        gguf(pair("a", 9, struct.pack("<IQ", 4, 1 << 62)), info(), pairs=1),
        gguf(pair("a", 9, struct.pack("<IQ", 8, 1 << 62)), info(), pairs=1),
        gguf(pair("a", 9, struct.pack("<IQ", 9, 1) * 50), info(), pairs=1),
        gguf(pair("a", 77, b""), info(), pairs=1),
        gguf(pair("general.alignment", 4, struct.pack("<I", 0)), info(), pairs=1),
        gguf(pair("general.alignment", 4, struct.pack("<I", 0xFFFFFFFF)), info(), pairs=1),
        gguf(info(rank=200)),
        gguf(info(rank=0, shape=())),
        gguf(info(shape=(1 << 62, 1 << 62))),
        gguf(info(shape=(0, 4))),
        gguf(info(kind=4242)),
        gguf(info(offset=1 << 63)),
        gguf(info(), data=bytes(100)),
        gguf(info(shape=(33,), kind=2)),  # not whole blocks
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_lying_gguf_files(content: bytes, tmp_path: Path) -> None:
    """Sizes that overflow, counts that nothing backs, divisions by zero: refused by the header alone."""
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelRefused) as refused:
        check_gguf(file)
    assert str(tmp_path) not in str(refused.value)


def test_fuzzed_gguf_headers(tmp_path: Path) -> None:
    """A thousand honest files with some bytes exchanged: refused or not, never anything else."""
    draw, file = random.Random(5), tmp_path / "m.gguf"
    whole = gguf(NAMES, ARRAY, info(), pairs=2)
    for _ in range(1000):
        content = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.randint(1, 4)):
            if content:
                content[draw.randrange(len(content))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        file.write_bytes(content)
        try:
            check_gguf(file)
        except ModelRefused:
            continue

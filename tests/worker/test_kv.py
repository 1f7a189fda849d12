"""KV in the arena: both layouts inside a block, and the way to host memory and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.core.shapes import LayerShape
from seallmd.runtime.host_memory import HostMemory
from seallmd.worker.device import CpuDevice, _rows
from seallmd.worker.kv import KvView, page_of
from seallmd.worker.memory import HostKv
from tests.worker.helpers import VOCABULARY, Rig, Talk, plain, plain_logits, run_step, save_tiny

LAYOUTS: list[Literal["merged", "split"]] = ["merged", "split"]
SHAPES = [LayerShape(2, 8, 8), LayerShape(1, 8, 4), LayerShape(3, 8, 8)]  # 32, 12 and 48 elements a token
SMALL_BLOCK_BYTES = 2048  # a few tokens in either layout, so that requests have several pages


@pytest.fixture(params=["torch", "compiled"])
def with_operations(request: pytest.FixtureRequest) -> None:
    """Everything is to hold with the compiled operations and without."""
    if request.param == "compiled":
        request.getfixturevalue("native")


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, VOCABULARY), k=length)


# ------------------------------------------------------------------------------------------- layouts


def test_pages() -> None:
    """Merged: all layers of a token share a block. Split: each layer has its own, of the largest's tokens."""
    assert page_of(SHAPES, 4, 4096, "merged") == (4096 // 368, 1)
    assert page_of(SHAPES, 4, 4096, "split") == (4096 // 192, 3)
    assert page_of(SHAPES, 2, 96, "split") == (1, 3)
    for layout, size in (("merged", 183), ("split", 95)):
        with pytest.raises(ValueError, match="smaller than one token's KV"):
            page_of(SHAPES, 2, size, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_a_place_of_its_own(layout: str) -> None:
    """Views of no two layers, tokens, or K and V overlap, and none leaves the blocks of its page."""
    arena = torch.zeros(12 * 1024, dtype=torch.uint8)
    kv = KvView(arena, 1024, SHAPES, torch.float32, layout)
    table = [7, 2, 9, 4, 0, 11][: 2 * kv.page.blocks]
    pages = torch.tensor(table).view(-1, kv.page.blocks)
    count, stamp = 2 * kv.page.tokens, 0.0
    written = []
    for layer, shape in enumerate(SHAPES):
        key, value = (torch.full((count, shape.kv_heads, d), 0.0) for d in (shape.k_dim, shape.v_dim))
        for tensor in (key, value):
            tensor += stamp + torch.arange(tensor.numel()).view(tensor.shape) + 1
            stamp += tensor.numel()
        positions = torch.arange(count)
        kv.write(layer, pages[positions // kv.page.tokens], positions % kv.page.tokens, key, value)
        written.append((key, value))
    for layer, (key, value) in enumerate(written):
        read = kv.read(layer, pages)
        assert torch.equal(read[0], key)
        assert torch.equal(read[1], value)
    others = [block for block in range(12) if block not in table]
    assert not arena.view(12, -1)[others].any()


@pytest.mark.usefixtures("with_operations")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_split_equals_plain_forward(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Full, sliding and mixed layers, sinks, unequal K and V: one layer per block gives the plain logits."""
    directory = save_tiny(tmp_path / "m", family)
    model = plain(directory)
    rig = Rig(monkeypatch, tmp_path / "cache", 4096, SMALL_BLOCK_BYTES, "split")
    rig.load("s", directory)
    rig.spoil(rig.free)
    a, b, c = (Talk(rig, i, "s", prompt(n)) for i, n in enumerate((23, 5, 41)))
    run_step(rig, model, [(a, 9), (b, 5)])
    run_step(rig, model, [(a, 14), (b, 1), (c, 30)])
    run_step(rig, model, [(b, 1), (c, 11), (a, 1)])
    for _ in range(4):
        run_step(rig, model, [(a, 1), (b, 1), (c, 1)])
    assert len(c.table) > len(rig.shapes["s"].layers), "one page would not show a wrong order"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_blocks_change_no_bit(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiled attention sums in the same order whatever the layout and the size of blocks."""
    directory, logits = save_tiny(tmp_path / "m", family), []
    for layout, block_bytes in (("merged", 2048), ("merged", 10240), ("split", 2048), ("split", 1 << 16)):
        rig = Rig(monkeypatch, tmp_path / "cache", 512, block_bytes, layout)  # type: ignore[arg-type]
        rig.load("s", directory)
        talk = Talk(rig, 1, "s", prompt(200))
        run_step(rig, plain(directory), [(talk, 130)])
        run_step(rig, plain(directory), [(talk, 70)])
        logits.append(rig.logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_half_a_page_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table that is no whole number of pages would shift every layer behind it."""
    rig = Rig(monkeypatch, tmp_path / "cache", 1024, SMALL_BLOCK_BYTES, "split")
    rig.load("s", save_tiny(tmp_path / "m"))
    blocks = rig.blocks("s", 0, 5)
    admit = msg.Admit(1, (3, 4, 5), 3, msg.Sampling(temperature=0.0))
    failed = rig.step("s", [admit], [msg.Row(1, 0, 3, True, (*blocks, rig.free.pop()))])
    assert isinstance(failed, msg.StepFailed)


# ------------------------------------------------------------------------------------- host memory


@pytest.mark.usefixtures("with_operations")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_restored(
    layout: Literal["merged", "split"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A preempted request goes on from other blocks with what it had, as if nothing had happened."""
    directory = save_tiny(tmp_path / "m")
    model = plain(directory)
    rig = Rig(monkeypatch, tmp_path / "cache", 4096, SMALL_BLOCK_BYTES, layout, 64 * SMALL_BLOCK_BYTES)
    rig.load("s", directory)
    talk, other = Talk(rig, 1, "s", prompt(38)), Talk(rig, 2, "s", prompt(9))
    run_step(rig, model, [(talk, 38), (other, 9)])
    slots = [*range(7, 7 + len(talk.table) - 2), 3, 2]  # a run of neighbours and two apart
    rig.worker.handle(msg.SaveBlocks(tuple(talk.table), tuple(slots)))
    rig.worker.handle(msg.Forget((1,)))
    rig.spoil(talk.table)
    rig.free = talk.table + rig.free  # taken last: the request comes back to other blocks
    run_step(rig, model, [(other, 1)])
    blocks = tuple(rig.free.pop() for _ in slots)
    rig.worker.handle(msg.RestoreBlocks(tuple(slots), blocks))
    admit = msg.Admit(1, tuple(talk.tokens), talk.prompt, msg.Sampling(temperature=0.0))
    done = rig.step("s", [admit], [msg.Row(1, talk.run, 1, True, blocks)])
    assert done.tokens == (int(plain_logits(model, talk.tokens).argmax()),)
    talk.tokens.append(done.tokens[0])
    talk.run, talk.table = talk.run + 1, list(blocks)
    for _ in range(3):
        run_step(rig, model, [(talk, 1), (other, 1)])


@pytest.mark.parametrize(
    "message",
    [
        msg.SaveBlocks((0,), (2,)),
        msg.SaveBlocks((0, -1), (0, 1)),
        msg.RestoreBlocks((2,), (0,)),
        msg.RestoreBlocks((0,), (16,)),
        msg.RestoreBlocks((0, 1), (0,)),
    ],
)
def test_blocks_and_slots_that_are_not_there(
    message: msg.Message, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A defect of the daemon ends the worker; it does not copy what others own."""
    rig = Rig(monkeypatch, tmp_path / "cache", 16, SMALL_BLOCK_BYTES, host_kv_bytes=2 * SMALL_BLOCK_BYTES + 5)
    with pytest.raises((RuntimeError, ValueError)):
        rig.worker.handle(message)


def test_host_memory_that_is_not_there(tmp_path: Path) -> None:
    """More than the machine has is refused at start, instead of being killed while it is touched."""
    settings = msg.WorkerSettings("t", "cpu", 1 << 20, 0, 1 << 16, cache=str(tmp_path), host_kv_bytes=1 << 50)
    with pytest.raises(MemoryError, match="host memory for KV"):
        CpuDevice(settings)


def test_neighbours_are_copied_together() -> None:
    """One copy per run of blocks that lie side by side on both ends, and none that crosses a gap."""
    source, target = torch.zeros(9, 4), torch.zeros(9, 4)
    pairs = list(_rows(source, (1, 2, 3, 5, 6, 0), target, (4, 5, 6, 7, 2, 3)))
    assert [len(rows) for rows, _ in pairs] == [3, 1, 1, 1]
    assert [to.storage_offset() // 4 for _, to in pairs] == [4, 7, 2, 3]
    assert list(_rows(source, (), target, ())) == []


def test_moved_to_another_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A request goes on on another device from what its former worker has left in host memory."""
    memory = HostMemory(2, 64 * SMALL_BLOCK_BYTES)
    rigs = [
        Rig(
            *(monkeypatch, tmp_path / "cache", 512, SMALL_BLOCK_BYTES, "merged", 64 * SMALL_BLOCK_BYTES),
            host_kv=memory.paths,
            index=index,
        )
        for index in range(2)
    ]
    directory = save_tiny(tmp_path / "m")
    model = plain(directory)
    for rig in rigs:
        rig.load("s", directory)
    talk = Talk(rigs[0], 1, "s", prompt(38))
    run_step(rigs[0], model, [(talk, 38)])
    slots = tuple(range(3, 3 + len(talk.table)))
    rigs[0].worker.handle(msg.SaveBlocks(tuple(talk.table), slots, 7))
    rigs[0].worker.handle(msg.Forget((1,)))
    rigs[0].worker.tell_copied()
    assert rigs[0].said[-1] == msg.BlocksCopied(7)
    assert not rigs[0].worker.copying_kv
    rigs[0].spoil(talk.table)
    blocks = tuple(rigs[1].free.pop() for _ in slots)
    rigs[1].worker.handle(msg.RestoreBlocks(slots, blocks, 8, 0))
    rigs[1].worker.tell_copied()
    assert rigs[1].said[-1] == msg.BlocksCopied(8)
    admit = msg.Admit(1, tuple(talk.tokens), talk.prompt, msg.Sampling(temperature=0.0))
    done = rigs[1].step("s", [admit], [msg.Row(1, talk.run, 1, True, blocks)])
    assert done.tokens == (int(plain_logits(model, talk.tokens).argmax()),)
    memory.close()


def test_host_memory_outlives_its_worker(tmp_path: Path) -> None:
    """What a worker has left there is what the next one finds; and nothing where there is to be none."""
    memory = HostMemory(1, 4 << 12)
    settings = msg.WorkerSettings(
        "t", "cpu", block_bytes=1 << 12, cache=str(tmp_path), host_kv_bytes=4 << 12, host_kv=memory.paths
    )
    HostKv(settings).own[2] = 7
    found = HostKv(settings).own
    assert found.shape == (4, 1 << 12)
    assert found[2].eq(7).all()
    assert found[1].eq(0).all()
    memory.close()
    assert HostMemory(2, 0).paths == ()
    nothing = HostKv(msg.WorkerSettings("t", "cpu", block_bytes=1 << 12, cache=str(tmp_path)))
    assert nothing.own.shape == (0, 1 << 12)

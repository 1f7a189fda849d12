"""The ledger of host memory for KV: every slot is somebody's or free, whoever reads it and whoever dies."""

from __future__ import annotations

import random

import pytest

from seallmd.core.host_kv import HostKv, SavedKv


def ledger(capacity: int = 8) -> HostKv:
    return HostKv.of(range(3), capacity)


def saved_on(kv: HostKv, *devices: int, blocks: int = 3) -> SavedKv:
    tables = tuple(list(range(blocks)) for _ in devices)
    saved, told = kv.save(1, devices, tables, 10)
    assert [device for device, _ in told] == list(devices)
    return saved


def test_its_own_device_reads_it_at_once() -> None:
    """Messages to one worker are carried out in order: the slots are free before anything has been copied."""
    kv = ledger()
    saved = saved_on(kv, 1)
    assert kv.used(1) == 3
    assert saved.within_reach((1,))
    assert not saved.within_reach((2,))
    ((device, message),) = kv.restore(saved, (1,), ([9, 8, 7],), skip=1)
    assert (device, message.device, message.copy, message.dst) == (1, 1, 0, (8, 7))
    assert kv.used(1) == 0
    assert kv.copied(1, 1) is saved  # late, and of no consequence
    kv.check([])


def test_another_device_reads_what_has_been_copied() -> None:
    """Not before every rank has said so; and nobody else gets the slots before it has read them."""
    kv = ledger()
    saved = saved_on(kv, 0, 1)
    assert kv.copied(0, 1) is None
    assert not saved.within_reach((1, 2))
    assert kv.copied(1, 1) is saved
    assert saved.within_reach((1, 2))
    assert not saved.within_reach((2,)), "another number of ranks has other KV"
    told = kv.restore(saved, (1, 2), ([4, 5, 6], [4, 5, 6]))
    kv.check([])
    assert [kv.used(device) for device in range(3)] == [3, 3, 0]
    for device, message in told:
        assert kv.copied(device, message.copy) is None
    assert [kv.used(device) for device in range(3)] == [0, 0, 0]


def test_a_reader_dies() -> None:
    """It reads no more."""
    kv = ledger()
    saved = saved_on(kv, 0)
    kv.copied(0, 1)
    kv.restore(saved, (2,), ([4, 5, 6],))
    kv.lost(0)
    assert kv.used(0) == 3, "it is still being read"
    kv.lost(2)
    assert kv.used(0) == 0


def test_a_writer_dies() -> None:
    """What it was copying never will be there, whatever its successor says; what it had copied is."""
    kv = ledger()
    done, under_way = saved_on(kv, 0), saved_on(kv, 0)
    kv.copied(0, 1)
    kv.lost(0)
    assert kv.copied(0, 2) is None
    assert done.copied
    assert not under_way.copied
    kv.drop(done)
    kv.drop(under_way)
    kv.check([])


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed: int) -> None:
    """No slot is lost or given twice."""
    chance, kv = random.Random(seed), ledger(12)
    held: list[SavedKv] = []
    unsaid: list[tuple[int, int]] = []
    for _ in range(2000):
        devices = tuple(chance.sample(range(3), chance.choice((1, 1, 2))))
        blocks = chance.randint(1, 4)
        match chance.choice(("save", "restore", "drop", "copied", "copied", "lost")):
            case "save" if kv.available(devices) >= blocks:
                saved, told = kv.save(1, devices, tuple([0] * blocks for _ in devices), 5)
                held.append(saved)
                unsaid += [(device, message.copy) for device, message in told]
            case "restore" if held and held[-1].within_reach(devices):
                saved = held.pop()
                tables = tuple([0] * len(slots) for slots in saved.slots)
                back = kv.restore(saved, devices, tables, skip=chance.randint(0, 1))
                unsaid += [(device, message.copy) for device, message in back if message.copy]
            case "drop" if held:
                kv.drop(held.pop(chance.randrange(len(held))))
            case "copied" if unsaid:
                kv.copied(*unsaid.pop(chance.randrange(len(unsaid))))
            case "lost" if chance.random() < 0.1:
                dead = chance.randrange(3)
                kv.lost(dead)
                unsaid = [(device, copy) for device, copy in unsaid if device != dead]
                for saved in [saved for saved in held if dead in saved.copying]:
                    held.remove(saved)
                    kv.drop(saved)
        kv.check(held)
    for saved in held:
        kv.drop(saved)
    for device, copy in unsaid:
        kv.copied(device, copy)
    assert [kv.used(device) for device in range(3)] == [0, 0, 0]

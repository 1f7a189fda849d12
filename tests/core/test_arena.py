"""The ledger: places, counts, cached prefixes, moves."""

from __future__ import annotations

import random

import pytest

from seallmd.core.arena import Arena


def test_kv_comes_from_the_top_and_weights_from_the_bottom() -> None:
    """Runs stay whole because the two grow towards each other."""
    arena = Arena(10)
    assert arena.take(2) == [9, 8]
    placement = arena.place("m", [3, 2])
    assert placement is not None
    assert placement.starts == (0, 3)
    assert placement.moves == ()
    assert (arena.available, arena.kv, arena.weights) == (3, 2, 5)
    arena.check()


def test_weights_return_to_their_former_place() -> None:
    """Captured addresses stay valid over an eviction when nobody took the place."""
    arena = Arena(20)
    arena.place("first", [4])
    there = arena.place("m", [3, 2])
    assert there is not None
    arena.free_weights("first")
    arena.free_weights("m")
    again = arena.place("m", [3, 2], former=there.starts)
    assert again == there
    arena.check()


def test_held_kv_makes_way_and_keeps_its_references() -> None:
    """A run that is in use by KV is cleared by moving, not refused."""
    arena = Arena(8)
    blocks = arena.take(8)
    arena.release([b for b in blocks if b in (0, 2, 5, 7)])
    arena.share(3)
    placement = arena.place("m", [3])
    assert placement is not None
    moved = dict(placement.moves)
    assert set(moved) <= {1, 3, 4, 6}
    assert not set(moved.values()) & set(range(placement.starts[0], placement.starts[0] + 3))
    assert arena.refs(moved.get(3, 3)) == 2
    arena.check()


def test_moves_never_form_chains() -> None:
    """The worker may copy moves in any grouping: no block is both a source and a target."""
    rng = random.Random(0)
    for _ in range(200):
        arena = Arena(40)
        blocks = arena.take(40)
        arena.release(rng.sample(blocks, 25))
        placement = arena.place("m", [rng.randint(1, 7) for _ in range(4)])
        if placement is not None:
            sources, targets = {s for s, _ in placement.moves}, {t for _, t in placement.moves}
            assert not sources & targets
        arena.check()


def test_a_plan_that_fails_changes_nothing() -> None:
    """No half-made placement: three runs of 2 between single weights cannot hold 3."""
    arena = Arena(8)
    for name, size in (("a", 2), ("x", 1), ("b", 2), ("y", 1), ("c", 2)):
        arena.place(name, [size])
    for name in "abc":
        arena.free_weights(name)
    assert arena.available == 6
    assert arena.place("m", [3]) is None
    assert arena.available == 6
    arena.check()


def test_fits_tells_who_must_leave() -> None:
    """Enough free blocks are not enough when weights cut them into short runs."""
    arena = Arena(10)
    arena.place("low", [4])
    arena.place("middle", [2])
    arena.free_weights("low")
    assert arena.available == 8
    assert not arena.fits([6], without=[], kv_stays=True)
    assert arena.fits([6], without=["middle"], kv_stays=True)
    held = arena.take(8)
    assert not arena.fits([4], without=[], kv_stays=True)
    assert arena.fits([4], without=[], kv_stays=False)
    arena.release(held)
    arena.check()


def test_cached_blocks_are_free_least_recently_used_first() -> None:
    """What prefix reuse keeps never stands in anybody's way."""
    arena = Arena(4)
    first, second = arena.take(2)
    arena.prefix.insert("root", (1,), first)
    arena.prefix.insert("root", (2,), second)
    arena.release([first])
    arena.release([second])
    assert (arena.available, arena.cached) == (4, 2)
    arena.take(3)
    assert arena.prefix.match("root", [1], 1) == []
    assert arena.prefix.match("root", [2], 1) == [second]
    arena.check()


def test_a_shared_block_is_free_when_its_last_reader_leaves() -> None:
    """Reference counts decide, not the first release."""
    arena = Arena(4)
    (block,) = arena.take(1)
    arena.share(block)
    arena.release([block])
    assert arena.kv == 1
    arena.release([block])
    assert arena.kv == 0
    with pytest.raises(AssertionError):
        arena.release([block])


def test_taking_more_than_there_is_raises() -> None:
    """Callers look first; a miscount must not go unnoticed."""
    with pytest.raises(AssertionError):
        Arena(2).take(3)


@pytest.mark.parametrize("seed", range(8))
def test_random_use(seed: int) -> None:
    """Any mix of takes, shares, releases, placements and prefixes keeps the books straight."""
    rng = random.Random(seed)
    arena = Arena(64)
    held: list[list[int]] = []
    resident: list[str] = []
    for turn in range(600):
        match rng.randrange(6):
            case 0 | 1 if arena.available >= 4:
                blocks = arena.take(rng.randint(1, 4))
                if rng.random() < 0.5:
                    parent: object = "root"
                    for block in blocks:
                        parent = arena.prefix.insert(parent, (rng.randrange(3),), block)
                held.append(blocks)
            case 2 if held:
                table = rng.choice(held)
                for block in table:
                    arena.share(block)
                held.append(list(table))
            case 3 if held:
                arena.release(held.pop(rng.randrange(len(held))))
            case 4:
                placement = arena.place(f"m{turn}", [rng.randint(1, 9) for _ in range(rng.randint(1, 3))])
                if placement is not None:
                    resident.append(f"m{turn}")
                    renamed = dict(placement.moves)
                    held = [[renamed.get(b, b) for b in table] for table in held]
            case 5 if resident:
                arena.free_weights(resident.pop(rng.randrange(len(resident))))
        arena.check()
    for table in held:
        arena.release(table)
    for name in resident:
        arena.free_weights(name)
    assert arena.available == 64

"""Weights that come in: they serve before all are there, and cancelled or failing they disturb nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seallmd.core import messages as msg
from seallmd.worker import device, main
from tests.worker.helpers import Rig, Talk, plain, run_step, save_tiny


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """A worker that has a service, and copies little at a time from here on."""
    rig = Rig(monkeypatch, tmp_path / "cache")
    rig.load("s", save_tiny(tmp_path / "m"))
    monkeypatch.setattr(device, "CHUNK_BYTES", 4096)
    return rig


def begin(rig: Rig, pieces: int) -> msg.CopyIn:
    """Evict the service and bring it in again, until it computes and so much of it has been copied."""
    copy = rig.coming(*rig.evict("s"))
    rig.worker.handle(copy)
    for _ in range(1 + pieces):
        rig.worker.advance()
    (done,) = (m for m in rig.said if not isinstance(m, msg.JobProgress))
    assert isinstance(done, msg.CopyDone)
    rig.said.clear()
    return copy


def finish(rig: Rig) -> None:
    while rig.worker.copying:
        rig.worker.advance()


def where(rig: Rig) -> tuple[bool, bool]:
    """Whether some and whether all weights of the service are read from the arena."""
    arena = rig.device.arena
    begin, end = arena.data_ptr(), arena.data_ptr() + arena.numel()
    model = rig.worker._resident["s"].model
    inside = [begin <= weight.data_ptr() < end for weight in model.parameters()]
    return any(inside), all(inside)


def is_mapped(image: str) -> bool:
    inodes = {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines()}
    return str(Path(image).stat().st_ino) in inodes


def test_it_computes_before_all_has_been_copied(loaded: Rig, tmp_path: Path) -> None:
    """The same tokens out of its image, across the arrival, and out of the arena."""
    begin(loaded, pieces=3)
    assert loaded.worker.copying
    assert where(loaded) == (False, False)
    model, talk = plain(tmp_path / "m"), Talk(loaded, 1, "s", [3, 4, 5])
    run_step(loaded, model, [(talk, 3)])
    run_step(loaded, model, [(talk, 1)])
    finish(loaded)
    assert where(loaded) == (True, True)
    run_step(loaded, model, [(talk, 1)])


def test_the_end_of_a_copy_is_told(loaded: Rig) -> None:
    """By progress alone, when nothing is read from the image any more."""
    begin(loaded, pieces=1)
    finish(loaded)
    total = sum(loaded.shapes["s"].segments)
    assert loaded.said == [msg.JobProgress("s", "copy", total, total)]


def test_an_image_that_is_dropped_serves_until_the_copy_ends(loaded: Rig, tmp_path: Path) -> None:
    """And then its memory is given back: no view of it is kept."""
    image = begin(loaded, pieces=1).image
    loaded.worker.handle(msg.DropImage("s"))
    model, talk = plain(tmp_path / "m"), Talk(loaded, 1, "s", [3, 4, 5])
    run_step(loaded, model, [(talk, 3)])
    assert is_mapped(image)
    finish(loaded)
    assert not is_mapped(image)
    run_step(loaded, model, [(talk, 1)])


@pytest.mark.parametrize("pieces", [0, 3])
def test_an_eviction_ends_the_copy(pieces: int, loaded: Rig, tmp_path: Path) -> None:
    """Its extents may be given away at once, nothing is told, and no step runs from the image."""
    copy = begin(loaded, pieces)
    loaded.worker.handle(msg.DropWeights("s"))
    assert not loaded.worker.copying
    assert not loaded.said
    loaded.sent["s"] = copy
    back = loaded.evict("s")
    assert "not resident" in loaded.step("s", [], [msg.Row(1, 0, 1, True)]).reason
    loaded.copy_in("s", *back)
    run_step(loaded, plain(tmp_path / "m"), [(Talk(loaded, 1, "s", [3, 4, 5]), 3)])


@pytest.mark.parametrize("fault", ["image", "extents", "outside", "twice"])
def test_failed_copy(fault: str, loaded: Rig) -> None:
    """A copy that cannot be done is told with its number, and the worker goes on."""
    image, probed = loaded.sent["s"].image, msg.Probed("s", loaded.sent["s"].directory, loaded.shapes["s"])
    if fault != "twice":
        loaded.evict("s")
    copy = loaded.coming(probed, "/proc/self/fd/9999" if fault == "image" else image)
    *others, last = copy.extents
    if fault == "extents":
        copy = loaded.coming(probed, image, extents=tuple(others))
    if fault == "outside":
        outside = msg.Extent(last.image_at, last.bytes_, 1 << 40)
        copy = loaded.coming(probed, image, extents=(*others, outside))
    loaded.worker.handle(copy)
    finish(loaded)
    failed = loaded.take()
    assert isinstance(failed, msg.CopyFailed)
    assert failed.copy == 5


def test_residents_step_during_a_copy(loaded: Rig, tmp_path: Path) -> None:
    """One message, then one chunk: steps are answered while a long copy is under way, and the copy ends."""
    loaded.load("t", save_tiny(tmp_path / "t", "qwen2"))
    copy = loaded.coming(*loaded.evict("t"))
    admits, row = Talk(loaded, 1, "s", [3, 4, 5]).row(3)

    class Script:
        """Messages at once, then silence until the copy is done."""

        def __init__(self) -> None:
            self.messages: Iterator[Any] = iter(
                [
                    copy,
                    msg.Step(1, "s", tuple(admits), (row,)),
                    *(msg.Step(2 + i, "s", (), (msg.Row(1, 3 + i, 1, True),)) for i in range(4)),
                ]
            )

        def get(self, timeout: float | None) -> Any:
            message = next(self.messages, None)
            return msg.Shutdown() if message is None and timeout is None else message

    main._serve(Script(), loaded.worker)  # type: ignore[arg-type]
    assert [type(m) for m in loaded.said] == [msg.CopyDone, *[msg.StepDone] * 5, msg.JobProgress]
    assert loaded.said[-1].done == loaded.said[-1].total == sum(loaded.shapes["t"].segments)

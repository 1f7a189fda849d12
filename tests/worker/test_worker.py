"""The worker's messages: steps that fail, and what they may not disturb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seallmd.core import messages as msg
from tests.worker.helpers import BLOCK_BYTES, GREEDY, Rig, Talk, plain, run_step, save_tiny


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return Rig(monkeypatch, tmp_path / "cache")


@pytest.fixture
def loaded(rig: Rig, tmp_path: Path) -> Rig:
    rig.load("s", save_tiny(tmp_path / "m"))
    return rig


def admit(request: int, tokens: list[int], sampling: msg.Sampling = GREEDY) -> msg.Admit:
    return msg.Admit(request, tuple(tokens), len(tokens), sampling)


@pytest.mark.parametrize(
    ("service", "row", "reason"),
    [
        ("absent", {}, "absent is not resident"),
        ("s", {"request": 99}, "request 99"),
        ("s", {"start": 2}, "5 tokens were run"),
        ("s", {"count": 3}, "ends at 8 of 6 tokens"),
        ("s", {"count": 0}, "row of 0"),
        ("s", {"request": 2, "start": 0, "count": 60, "blocks": ()}, "cannot hold"),
    ],
)
def test_impossible_steps_fail_alone(
    service: str, row: dict[str, Any], reason: str, loaded: Rig, tmp_path: Path
) -> None:
    """A step that contradicts what is known is told as such, drops its requests, and nothing else happens."""
    model = plain(tmp_path / "m")
    other = Talk(loaded, 7, "s", [5, 6, 7, 8])
    run_step(loaded, model, [(other, 4)])
    first = msg.Row(1, 0, 5, True, loaded.blocks("s", 0, 9))
    loaded.step("s", [admit(1, [3, 4, 5, 6, 7]), admit(2, [9] * 60)], [first])
    wrong = {"request": 1, "start": 5, "count": 1, "sample": False, **row}
    failed = loaded.step(service, [], [msg.Row(**wrong)])
    assert isinstance(failed, msg.StepFailed)
    assert reason in failed.reason
    late = loaded.step("s", [], [msg.Row(wrong["request"], 50, 1, True)])
    assert late == msg.StepDone(loaded.steps, (0,), late.seconds)
    run_step(loaded, model, [(other, 1)])


def test_bad_token_ids(loaded: Rig) -> None:
    """An id without an embedding must not reach the kernel, where it would end a GPU's process."""
    for bad in (97, -1):
        failed = loaded.step("s", [admit(1, [3, bad])], [msg.Row(1, 0, 2, True, loaded.blocks("s", 0, 2))])
        assert "outside the vocabulary" in failed.reason


def test_failed_requests_are_skipped_until_forgotten(loaded: Rig, tmp_path: Path) -> None:
    """Rows sent before the daemon knew of a failure are skipped; those of their neighbours are run."""
    model = plain(tmp_path / "m")
    good = Talk(loaded, 1, "s", [3, 4, 5])
    run_step(loaded, model, [(good, 3)])
    loaded.step("s", [admit(2, [8, 9])], [msg.Row(2, 1, 5, True)])
    _, row = good.row(1)
    done = loaded.step("s", [], [msg.Row(2, 6, 1, True), row, msg.Row(2, 7, 1, False)])
    assert done.tokens[0] == 0
    assert len(done.tokens) == 2
    good.tokens.append(done.tokens[1])
    loaded.worker.handle(msg.Forget((2, 55)))
    assert isinstance(loaded.step("s", [], [msg.Row(2, 6, 1, True)]), msg.StepFailed)
    again = Talk(loaded, 2, "s", [8, 9])
    run_step(loaded, model, [(again, 2), (good, 1)])


def test_the_model_raising_is_a_failed_step(loaded: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a step ends that step, not the process."""

    def explode(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory,\nreally")

    monkeypatch.setattr("seallmd.worker.forward.PagedBatch.attend", explode)
    failed = loaded.step("s", [admit(1, [3])], [msg.Row(1, 0, 1, True, loaded.blocks("s", 0, 1))])
    assert failed == msg.StepFailed(loaded.steps, "out of memory, really", memory=True)


def test_dropped_service_cannot_step(loaded: Rig) -> None:
    """After DropWeights its bytes belong to others, so nothing may read them."""
    loaded.evict("s")
    failed = loaded.step("s", [admit(1, [3])], [msg.Row(1, 0, 1, True)])
    assert "not resident" in failed.reason


def test_draws_survive_batching_and_restart(loaded: Rig) -> None:
    """Sampled text depends on the seed alone: not on neighbours, chunking or a preemption in the middle."""

    def generate(request: int, chunks: list[int], restart_after: int, neighbours: bool) -> list[int]:
        tokens, run, table = [3, 4, 5, 6, 7, 8], 0, []
        sampling = msg.Sampling(temperature=1.0, top_p=0.9, seed=11, presence_penalty=0.4)
        admits = [msg.Admit(request, tuple(tokens), 6, sampling)]
        for index, chunk in enumerate([*chunks, *[1] * 8]):
            if index == restart_after:
                admits = [msg.Admit(request, tuple(tokens), 6, sampling)]
                run, table, chunk = 0, [], len(tokens)
            blocks = loaded.blocks("s", len(table), run + chunk)
            table += blocks
            sample = run + chunk == len(tokens)
            rows = [msg.Row(request, run, chunk, sample, blocks)]
            if neighbours:
                number = request * 100 + index
                other = msg.Sampling(temperature=2.0, seed=number)
                admits.append(msg.Admit(number, (9, 9, 9), 3, other))
                rows.insert(0, msg.Row(number, 0, 3, True, loaded.blocks("s", 0, 3)))
            done = loaded.step("s", admits, rows)
            run, admits = run + chunk, []
            if sample:
                tokens.append(done.tokens[-1])
        return tokens[6:14]

    alone = generate(1, [6], restart_after=-1, neighbours=False)
    assert generate(2, [2, 4], restart_after=-1, neighbours=True) == alone
    assert generate(3, [6], restart_after=4, neighbours=False) == alone


def test_moves_may_chain(loaded: Rig, tmp_path: Path) -> None:
    """Moves are carried out in order, so a place may be vacated and filled in one message."""
    model = plain(tmp_path / "m")
    talk = Talk(loaded, 1, "s", list(range(3, 40)))
    run_step(loaded, model, [(talk, len(talk.tokens))])
    assert len(talk.table) >= 2
    free = [loaded.free.pop() for _ in range(2)]
    src = (talk.table[0], talk.table[1], free[0])
    dst = (free[0], talk.table[0], free[1])
    loaded.worker.handle(msg.MoveBlocks(src, dst))
    loaded.device.arena.view(-1, BLOCK_BYTES)[[talk.table[1], free[0]]] = 255
    talk.table = [free[1], talk.table[0], *talk.table[2:]]
    for _ in range(2):
        run_step(loaded, model, [(talk, 1)])


def test_ping_is_answered(loaded: Rig) -> None:
    """By a worker with nothing to do, and by the host process: the daemon kills who does not."""
    loaded.worker.handle(msg.Ping())
    loaded.host.handle(msg.Ping())
    assert loaded.said[-2:] == [msg.Pong(), msg.Pong()]


class NoMemory:
    """A model that asks for more memory than there is."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_lack_of_memory_is_told_as_such(
    error: Exception, loaded: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon then tries the requests one by one; other failures are not mistaken for it."""
    monkeypatch.setattr(loaded.worker, "_forward", NoMemory(error))
    row = msg.Row(1, 0, 2, True, loaded.blocks("s", 0, 2))
    failed = loaded.step("s", [admit(1, [3, 4])], [row])
    assert isinstance(failed, msg.StepFailed)
    assert failed.memory
    monkeypatch.setattr(loaded.worker, "_forward", NoMemory(RuntimeError("a shape is wrong")))
    assert not loaded.step("s", [admit(1, [3, 4])], [row]).memory  # type: ignore[union-attr]


def test_a_lost_device_ends_the_process(loaded: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else fails with CUDA stays with its context: only a new process helps."""
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(loaded.worker, "_forward", NoMemory(lost))
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        loaded.step("s", [admit(1, [3, 4])], [msg.Row(1, 0, 2, True, loaded.blocks("s", 0, 2))])

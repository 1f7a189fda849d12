"""A device whose calls return early: the next step is sent to it before the last one's tokens are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seallmd.core import messages as msg
from seallmd.worker import forward, main
from seallmd.worker.device import Arriving
from tests.worker.helpers import GREEDY, Rig, save_tiny
from tests.worker.test_grammar import byte_tokenizer
from tests.worker.test_graphs import Rerun

PROMPT = [5, 9, 30, 44, 7]


class Slow(Arriving):
    """Tokens that arrive when they are asked for."""

    def __init__(self, tensor: torch.Tensor, log: list[str]) -> None:
        super().__init__(tensor.clone())
        self._log = log

    def arrived(self) -> bool:
        return False

    def take(self) -> list[int]:
        self._log.append("read")
        return super().take()


def make_rig(
    monkeypatch: pytest.MonkeyPatch, folder: Path, late: bool, **fields: Any
) -> tuple[Rig, list[str]]:
    """A rig with service "s", and what its worker does, in order."""
    rig = Rig(monkeypatch, folder / "cache", **fields)
    if isinstance(fields.get("recorder"), Rerun):
        fields["recorder"].rig = rig
    byte_tokenizer(save_tiny(folder / "m"))
    rig.load("s", folder / "m")
    log: list[str] = []
    if late:
        rig.device.late = True
        monkeypatch.setattr(rig.device, "fetch", lambda tensor: Slow(tensor, log))
    run = forward.run

    def logged(*arguments: Any) -> forward.Outcome:
        log.append("run")
        return run(*arguments)

    monkeypatch.setattr(forward, "run", logged)
    return rig, log


class Pairs:
    """Sends steps of some requests one ahead of the answers, as the daemon does."""

    def __init__(self, rig: Rig, samplings: list[msg.Sampling]) -> None:
        self.rig, self.samplings, self.steps = rig, samplings, 0
        self.tables: list[tuple[int, ...]] = [rig.blocks("s", 0, 60) for _ in samplings]
        self.run = [0] * len(samplings)

    def send(self, rows: list[int]) -> None:
        """A step of these requests: their prompt first, then the token they drew last."""
        admits, wanted = [], []
        for n in rows:
            new = self.run[n] == 0
            if new:
                admits.append(msg.Admit(n, (*PROMPT, n + 3), len(PROMPT) + 1, self.samplings[n]))
            count = len(PROMPT) + 1 if new else 1
            wanted.append(msg.Row(n, self.run[n], count, True, self.tables[n] if new else ()))
            self.run[n] += count
        self.steps += 1
        self.rig.worker.handle(msg.Step(self.steps, "s", tuple(admits), tuple(wanted)))

    def answers(self) -> list[Any]:
        self.rig.worker.land()
        said, self.rig.said[:] = list(self.rig.said), []
        return [m for m in said if isinstance(m, msg.StepDone | msg.StepFailed)]


PLANS = [[0, 1], [0, 1], [1], [0, 1, 2], [2, 0], [0], [0, 1, 2], [1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("graphs", [False, True])
def test_draws_what_it_draws_one_by_one(
    graphs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tokens are fed forward on the device, in any order of rows, greedy and drawn by seed."""
    samplings = [
        msg.Sampling(temperature=0.0, logprobs=2),
        msg.Sampling(temperature=1.0, seed=3),
        msg.Sampling(temperature=0.8, top_p=0.9, seed=4),
    ]
    answers = []
    for late in (False, True):
        folder = tmp_path / str(late)
        folder.mkdir()
        with monkeypatch.context() as patch:
            rig, log = make_rig(patch, folder, late, recorder=Rerun() if graphs else None)
            pairs = Pairs(rig, samplings)
            for rows in PLANS:
                pairs.send(rows)
            answers.append([(done.step, done.tokens, done.scores) for done in pairs.answers()])
    assert answers[0] == answers[1]
    assert [step for step, *_ in answers[1]] == list(range(1, len(PLANS) + 1))
    assert log == ["run", *["run", "read"] * (len(PLANS) - 1), "read"]


@pytest.mark.parametrize(
    "sampling",
    [
        msg.Sampling(temperature=0.0, repetition_penalty=1.7),
        msg.Sampling(temperature=0.0, frequency_penalty=1.5),
        msg.Sampling(temperature=0.0, presence_penalty=1.5),
        msg.Sampling(temperature=0.0, bad_words=((5,), (9, 30))),
        msg.Sampling(temperature=1.0, grammar=msg.Grammar("start: /([a-f]{2}-){9}/", (2,))),
    ],
)
def test_what_needs_the_text_waits_for_it(
    sampling: msg.Sampling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A penalty counts the token drawn just now too, and a grammar follows it: the step is sent once it is
    known."""
    answers = []
    for late in (False, True):
        folder = tmp_path / str(late)
        folder.mkdir()
        with monkeypatch.context() as patch:
            rig, log = make_rig(patch, folder, late)
            pairs = Pairs(rig, [sampling, GREEDY])
            for _ in range(6):
                pairs.send([0, 1])
            answers.append([done.tokens for done in pairs.answers()])
    assert answers[0] == answers[1]
    assert log == ["run", "read"] * 6


def test_a_request_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forgotten, or started over, while its token is on the way: the step's answer is whole all the same."""
    rig, _ = make_rig(monkeypatch, tmp_path, late=True)
    pairs = Pairs(rig, [GREEDY, GREEDY])
    pairs.send([0, 1])
    rig.worker.handle(msg.Forget((0,)))
    pairs.run[0] = 0
    pairs.send([1, 0])
    pairs.send([0, 1])
    first, second, third = pairs.answers()
    assert second.tokens[1] == first.tokens[0]
    assert len(third.tokens) == 2


def test_a_failure_is_told_after_the_step_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first step's tokens count, although the second, behind it on the device, cannot be run."""
    rig, _ = make_rig(monkeypatch, tmp_path, late=True)
    pairs = Pairs(rig, [GREEDY, GREEDY])
    pairs.send([0, 1])
    pairs.run[0] += 1
    pairs.send([0])
    done, failed = pairs.answers()
    assert isinstance(done, msg.StepDone)
    assert len(done.tokens) == 2
    assert isinstance(failed, msg.StepFailed)
    pairs.send([1])
    assert len(pairs.answers()[0].tokens) == 1


def test_the_loop_tells_a_step_that_nothing_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a next message a step is told as soon as its tokens are there; before the end, in any case."""
    rig, log = make_rig(monkeypatch, tmp_path, late=True)
    row = msg.Row(1, 0, 5, True, rig.blocks("s", 0, 9))
    step = msg.Step(1, "s", (msg.Admit(1, tuple(PROMPT), 5, GREEDY),), (row,))
    waits: list[float | None] = []

    class Script:
        """A step, some silence, another step at once followed by the end."""

        def __init__(self) -> None:
            later = msg.Step(2, "s", (), (msg.Row(1, 5, 1, True),))
            self.messages: list[Any] = [step, None, None, None, later, msg.Shutdown()]

        def get(self, timeout: float | None) -> Any:
            waits.append(timeout)
            if len(waits) == 3:
                monkeypatch.setattr(Slow, "arrived", lambda _: True)
            return self.messages.pop(0)

    main._serve(Script(), rig.worker)  # type: ignore[arg-type]
    assert log == ["run", "read", "run", "read"]
    done = [m for m in rig.said if isinstance(m, msg.StepDone)]
    assert [m.step for m in done] == [1, 2]
    assert waits[0] is None
    assert waits[1] == main._FLIGHT_POLL_SECONDS

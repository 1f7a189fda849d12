"""KV on its way to host memory and back, as simulated devices carry it: what it holds, and what it takes."""

from __future__ import annotations

import pytest
from msgspec import structs

from seallmd.core import events as ev
from seallmd.core import messages as msg
from seallmd.sim.contention import Contention
from seallmd.sim.contents import Contents, Corruption, expected_output
from seallmd.sim.device import Blank, SimDevice, Span
from seallmd.sim.group import Meetings
from seallmd.sim.timing import Costs

BLOCK_TOKENS, BLOCK_BYTES, VOCAB = 4, 1000, 50
PROMPT = (3, 1, 4, 1, 5, 9, 2)
WEIGHTS = msg.CopyIn("s", "/", "float32", 99, "/i", (msg.Extent(0, BLOCK_BYTES, 0),))


def loaded() -> Contents:
    """A device whose block 0 holds the weights of "s"."""
    contents = Contents(BLOCK_BYTES, {"s": lambda: (BLOCK_TOKENS, 1)}, VOCAB)
    contents.copy_begins(WEIGHTS)
    contents.copy_ended(WEIGHTS)
    return contents


def step(tokens: tuple[int, ...], row: msg.Row) -> msg.Step:
    return msg.Step(1, "s", (msg.Admit(row.request, tokens, len(PROMPT), msg.Sampling()),), (row,))


def preempted() -> tuple[Contents, tuple[int, ...]]:
    """A request was run, saved from blocks 5 and 2 to slots 9 and 8, and forgotten; its tokens so far."""
    contents = loaded()
    drawn = contents.run(step(PROMPT, msg.Row(1, 0, 7, True, (5, 2))))
    contents.save((5, 2), (9, 8))
    contents.forget((1,))
    contents.run(step((7, 7, 7, 7, 7, 7), msg.Row(2, 0, 6, True, (2, 5))))  # others overwrite the blocks
    return contents, (*PROMPT, *drawn)


def test_a_restored_prefix_is_what_was_saved() -> None:
    """The request goes on behind its restored KV and draws what it must; the slots keep what they hold."""
    contents, tokens = preempted()
    contents.restore((9, 8), (7, 4), 0)
    assert contents.run(step(tokens, msg.Row(1, 7, 1, True, (7, 4)))) == (
        expected_output("s", PROMPT, 2, VOCAB)[1],
    )
    contents.restore((9, 8), (11, 12), 0)
    contents.run(step(tokens, msg.Row(3, 7, 1, True, (11, 12))))


@pytest.mark.parametrize("slots", [(8, 9), (9, 9)])
def test_wrong_slots_are_found(slots: tuple[int, int]) -> None:
    """Slots in a wrong order, or of another prefix, are corruption as soon as a step reads them."""
    contents, tokens = preempted()
    contents.restore(slots, (7, 4), 0)
    with pytest.raises(Corruption):
        contents.run(step(tokens, msg.Row(1, 7, 1, True, (7, 4))))


def test_nothing_is_saved_or_restored_that_is_not_there() -> None:
    """Weights, blocks that were never written and empty slots are no KV; slots outlive their worker."""
    contents, _ = preempted()
    for block in (0, 30):
        with pytest.raises(Corruption, match="saved as KV"):
            contents.save((block,), (1,))
    contents.reset()
    with pytest.raises(Corruption, match="nothing was saved"):
        contents.restore((5,), (7,), 0)
    with pytest.raises(Corruption, match="of device 3"):
        contents.restore((9,), (7,), 3)
    contents.restore((9,), (7,), 0)


@pytest.mark.parametrize("group", [None, msg.Group(2, 1, 2), msg.Group(2, 0, 4)])
def test_a_rank_may_not_read_what_another_wrote(group: msg.Group | None) -> None:
    """The same tokens and layer, but other heads: a step that takes them for its own is corruption."""
    contents = Contents(BLOCK_BYTES, {"s": lambda: (BLOCK_TOKENS, 1)}, VOCAB)
    for number, as_rank in enumerate((msg.Group(1, 0, 2), msg.Group(3, 0, 2), group)):
        weights = structs.replace(WEIGHTS, group=as_rank)
        contents.copy_begins(weights)
        contents.copy_ended(weights)
        if number == 0:
            contents.run(step(PROMPT, msg.Row(1, 0, 4, False, (5,))))
        elif number == 1:  # another group, but the same rank of as many
            contents.run(step(PROMPT, msg.Row(2, 4, 3, True, (5, 2))))
    with pytest.raises(Corruption, match="another rank's"):
        contents.run(step(PROMPT, msg.Row(3, 4, 3, True, (5, 2))))


class Clock:
    """Time for one device: what is to come, and what was said when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[tuple[float, ev.Event]] = []
        self._to_come: list[tuple[float, object]] = []

    def after(self, seconds: float, do: object) -> None:
        self._to_come.append((self.now + seconds, do))

    def happen(self, event: ev.Event) -> None:
        self.said.append((self.now, event))

    def run(self) -> None:
        while self._to_come:
            self._to_come.sort(key=lambda item: item[0])
            self.now, do = self._to_come.pop(0)
            do()  # type: ignore[operator]


@pytest.mark.parametrize(("given", "ended"), [((4,), 3.0), ((9,), 1.0), ((2,), 4.0)])
def test_steps_wait_for_the_blocks_that_they_are_given(given: tuple[int, ...], ended: float) -> None:
    """A step waits for what it is given to be saved (2 s) or restored (1 s more), and for nothing else."""
    clock = Clock()
    costs = Costs(step_fixed=1.0, step_token=0.0, copy_byte=1 / BLOCK_BYTES)
    device = SimDevice(
        *(clock, 0, 1 << 20, costs, Blank({}), Meetings(), Contention(clock, {})), block_bytes=BLOCK_BYTES
    )
    device.start()
    device.receive(msg.SaveBlocks((3, 4), (0, 1)))
    device.receive(msg.RestoreBlocks((1,), (2,)))
    device.receive(msg.Step(1, "s", (), (msg.Row(1, 0, 1, False, given),)))
    clock.run()
    at, event = clock.said[-1]
    assert isinstance(event, ev.FromDevice)
    assert event.message == msg.StepDone(1, (), 1.0)
    assert at == ended


@pytest.mark.parametrize(("early", "served"), [(True, 0.0), (False, 1.0)])
def test_weights_that_serve_before_they_have_been_copied(early: bool, served: float) -> None:
    """As on CPUs; the copy takes as long, and KV waits for it."""
    clock = Clock()
    costs = Costs(copy_byte=1 / BLOCK_BYTES, early=early)
    spans: list[Span] = []
    device = SimDevice(
        *(clock, 0, 1 << 20, costs, Blank({}), Meetings(), Contention(clock, {}), spans.append),
        block_bytes=BLOCK_BYTES,
    )
    device.start()
    device.receive(WEIGHTS)
    device.receive(msg.SaveBlocks((3,), (0,), 7))
    clock.run()
    answers = [(at, event.message) for at, event in clock.said[1:] if isinstance(event, ev.FromDevice)]
    assert answers == [(served, msg.CopyDone("s", served)), (2.0, msg.BlocksCopied(7))]
    assert [(span.began, span.ended) for span in spans] == [(0.0, 1.0)]

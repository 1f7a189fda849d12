"""What memory holds, written and checked: the mode in which tests look for corruption.

Owns the contents of one simulated device: each token's place in a KV block remembers which prefix was written
into it and by which rank of how many, on its way to host memory and back too, each block of weights whose
they are; a step that reads anything else raises `Corruption`. Must not know time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from seallmd.core import messages as msg


class Corruption(AssertionError):
    """A step read memory that does not hold what its request or its model wrote."""


@dataclass
class _Known:
    """A request as a worker knows it. digests[p] stands for tokens[: p + 1]. admit: what it came with."""

    service: str
    tokens: list[int]
    digests: list[int]
    admit: msg.Admit | None = None
    table: list[int] = field(default_factory=list)
    done: int = 0

    def append(self, token: int) -> None:
        before = (
            self.digests[-1] if self.digests else crc32(self.service.encode())
        )  # hash() of a text differs from run to run
        self.tokens.append(token)
        self.digests.append(hash((before, token)))


def next_token(digest: int, vocab: int) -> int:
    """What the made-up model draws after a prefix."""
    return (digest * 2654435761 >> 7) % vocab


def expected_output(service: str, prompt: tuple[int, ...], count: int, vocab: int) -> list[int]:
    """What a request must yield, whatever is done to it meanwhile (up to its stop ids)."""
    known = _Known(service, [], [])
    for token in prompt:
        known.append(token)
    for _ in range(count):
        known.append(next_token(known.digests[-1], vocab))
    return known.tokens[len(prompt) :]


def _run_at(table: Sequence[int], run: int, blocks: int) -> Sequence[int]:
    """The blocks of one run of tokens: one for all layers, or one per layer."""
    return table[run * blocks : (run + 1) * blocks]


def _scores(request: int, position: int, tokens: int) -> msg.Scores:
    return msg.Scores(request, position, 0, b"", b"", bytes(4 * tokens))


class Contents:
    """The memory of one device.

    runs: by service, tells the tokens and blocks of a run of KV. vocab: how many ids can be drawn. index: of
    the device. host: what slots of host memory hold, by device and slot; of all devices, and for good.
    """

    def __init__(
        self,
        block_bytes: int,
        runs: dict[str, Callable[[], tuple[int, int]]],
        vocab: int,
        index: int = 0,
        host: dict[tuple[int, int], list[object]] | None = None,
    ) -> None:
        self._block_bytes = block_bytes
        self._runs_of = runs
        self._vocab = vocab
        self._index = index
        self._host: dict[tuple[int, int], list[object]] = {} if host is None else host
        self.reset()

    def reset(self) -> None:
        """An empty arena, and no request known."""
        self._memory: dict[int, object] = {}
        self._weights: dict[str, list[tuple[int, int]]] = {}
        self._ranks: dict[str, tuple[int, int]] = {}  # which of how many parts of them
        self._requests: dict[int, _Known] = {}

    def copy_begins(self, message: msg.CopyIn) -> None:
        """Blocks are written from now on; what they held is gone."""
        for start, blocks in self._runs(message):
            for block in range(start, start + blocks):
                self._memory[block] = (message.service, message.copy)

    def copy_ended(self, message: msg.CopyIn) -> None:
        """The weights are complete."""
        group = message.group
        self._weights[message.service] = self._runs(message)
        self._ranks[message.service] = (0, 1) if group is None else (group.rank, group.ranks)

    def _runs(self, message: msg.CopyIn) -> list[tuple[int, int]]:
        unit = self._block_bytes
        return [(e.arena_at // unit, -(-e.bytes_ // unit)) for e in message.extents]

    def drop(self, service: str) -> None:
        """Weights that no step may use any more."""
        self._weights.pop(service, None)

    def move(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Blocks are copied and renamed in every table."""
        for source, target in zip(src, dst, strict=True):
            # One that a request is to have its KV in later may not have been written.
            self._memory[target] = self._memory.pop(source, None)
        renamed = dict(zip(src, dst, strict=True))
        for known in self._requests.values():
            known.table = [renamed.get(block, block) for block in known.table]

    def save(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """KV blocks are copied to slots of host memory. Raises Corruption for a block that holds no KV."""
        for block, slot in zip(src, dst, strict=True):
            held = self._memory.get(block)
            if not isinstance(held, list):
                raise Corruption(f"block {block} is saved as KV, but holds {held!r:.60}")
            self._host[self._index, slot] = list(held)

    def restore(self, src: Sequence[int], dst: Sequence[int], device: int) -> None:
        """Slots of host memory are copied to blocks. Raises Corruption for a slot that was never filled."""
        for slot, block in zip(src, dst, strict=True):
            if (device, slot) not in self._host:
                raise Corruption(f"slot {slot} of device {device} is restored, but nothing was saved there")
            self._memory[block] = list(self._host[device, slot])

    def forget(self, requests: Sequence[int]) -> None:
        """Requests that are over, preempted or failed."""
        for request in requests:
            self._requests.pop(request, None)

    def failed(self, step: msg.Step) -> None:
        """Its requests are over. Before the daemon hears of it, it may have their blocks saved: of no use."""
        self.forget([row.request for row in step.rows])
        for row in step.rows:
            self._leave_blank(step.service, row)

    def _leave_blank(self, service: str, row: msg.Row) -> None:
        """Blocks that a row was given and never wrote are KV, and nothing that is read from them is right.

        Those that it shares with others were written before.
        """
        for block in row.blocks:
            if not isinstance(self._memory.get(block), list):
                self._memory[block] = [None] * self._runs_of[service]()[0]

    def run(self, step: msg.Step) -> tuple[int, ...]:
        """Read and write what the step reads and writes; the tokens it draws. Raises Corruption."""
        self._check_weights(step.service)
        for admit in step.admit:
            known = self._requests[admit.request] = _Known(step.service, [], [], admit)
            for token in admit.tokens:
                known.append(token)
        drawn = [self._run_row(step.service, row) for row in step.rows]
        return tuple(token for token in drawn if token is not None)

    def scores(self, step: msg.Step) -> tuple[msg.Scores, ...]:
        """Empty of content; positions and numbers as a worker tells them."""
        found = []
        for row in step.rows:
            known = self._requests.get(row.request)
            if known is None or known.admit is None:
                continue
            admit, end = known.admit, row.start + row.count
            if admit.sampling.prompt_logprobs >= 0:
                first, behind = max(row.start + 1, admit.told), min(end + 1, admit.prompt)
                if first < behind:
                    found.append(_scores(row.request, first, behind - first))
            if admit.sampling.logprobs >= 0 and row.sample:
                found.append(_scores(row.request, end, 1))
        return tuple(found)

    def pooled(self, step: msg.Step) -> tuple[msg.Pooled, ...]:
        """The same for pooled prompts."""
        found = []
        for row in step.rows:
            known = self._requests.get(row.request)
            if known is None or known.admit is None or not known.admit.sampling.pooling:
                continue
            admit, behind = known.admit, row.start + row.count
            first = max(row.start, admit.told) if admit.sampling.pooling == "mean" else admit.prompt - 1
            if first < behind:
                found.append(msg.Pooled(row.request, first, behind - first, b""))
        return tuple(found)

    def _check_weights(self, service: str) -> None:
        if service not in self._weights:
            raise Corruption(f"a step of {service}, which is not resident")
        for start, blocks in self._weights[service]:
            for block in range(start, start + blocks):
                owner = self._memory.get(block)
                if not isinstance(owner, tuple) or owner[0] != service:
                    raise Corruption(f"block {block} of {service}'s weights holds {owner!r:.60}")

    def _run_row(self, service: str, row: msg.Row) -> int | None:
        known = self._requests.get(row.request)
        if known is None:  # an earlier step of it failed
            self._leave_blank(service, row)
            return 0 if row.sample else None
        size, blocks = self._runs_of[known.service]()
        rank = self._ranks[service]  # each has heads of its own
        known.table += row.blocks
        # Blocks that were shared hold their part already; a row starts behind it.
        if row.start + row.count > len(known.tokens):
            raise Corruption(f"request {row.request} runs tokens that nobody knows")
        for position in range(row.start, row.start + row.count):
            for layer, block in enumerate(_run_at(known.table, position // size, blocks)):
                slots = self._memory.get(block)
                if not isinstance(slots, list) or position % size == 0:
                    slots = self._memory[block] = list[object]([None] * size)
                slots[position % size] = (layer, known.digests[position], rank)
        for position in range(row.start + row.count):
            for layer, block in enumerate(_run_at(known.table, position // size, blocks)):
                slots = self._memory.get(block)
                wanted = (layer, known.digests[position], rank)
                if not isinstance(slots, list) or slots[position % size] != wanted:
                    raise Corruption(
                        f"request {row.request} position {position} was overwritten, or is another rank's"
                    )
        known.done = row.start + row.count
        if not row.sample:
            return None
        token = next_token(known.digests[known.done - 1], self._vocab)
        known.append(token)
        return token

"""What operators see of batches, and may do: everybody's, and end them.

Owns that view. Must not know the control socket.
"""

from __future__ import annotations

import time

import msgspec

from seallmd.api.batch.records import BatchRecord
from seallmd.api.batch.runner import Runner
from seallmd.api.batch.store import Store
from seallmd.errors import ControlError, RequestError

_MOST = 100


class BatchStatus(msgspec.Struct, frozen=True):
    """A batch. owner: its API key, empty = none was needed. lines: all of them; 0 until they were counted.

    left_seconds: until its deadline, 0 when it is over.
    """

    id: str
    owner: str
    endpoint: str
    status: str
    lines: int
    completed: int
    failed: int
    age_seconds: float
    left_seconds: float


class BatchOperator:
    """For the control socket."""

    def __init__(self, store: Store, runner: Runner) -> None:
        self._store = store
        self._runner = runner

    async def list(self) -> list[BatchStatus]:
        """Those that go on, and after them the last that are over. Raises ControlError."""
        try:
            found = await self._store(lambda _, batches: batches.everybodys(_MOST))
        except RequestError as error:
            raise ControlError(str(error)) from error
        return [_status(record) for record in found]

    async def cancel(self, batch: str) -> None:
        """Cancel a batch, whoever's it is. Raises ControlError."""
        try:
            owner = next((each.owner for each in await self.list() if each.id == batch), "")
            self._runner.cancel(await self._store(lambda _, batches: batches.cancel(owner, batch)))
        except RequestError as error:
            raise ControlError(str(error)) from error


def _status(record: BatchRecord) -> BatchStatus:
    now = time.time()
    return BatchStatus(
        id=record.id,
        owner=record.owner,
        endpoint=record.endpoint,
        status=record.status.value,
        lines=record.total,
        completed=record.completed,
        failed=record.failed,
        age_seconds=max(0.0, now - record.created_at),
        left_seconds=0.0 if record.is_over else max(0.0, record.deadline - now),
    )

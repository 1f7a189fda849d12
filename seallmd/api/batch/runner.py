"""Runs batches: reads their input, has each line answered as if it had come over HTTP, and ends them in time.

Owns which lines are in flight, at most so many for each model, and when a batch is over. A line that fails
for a reason that passes (its model comes in, the daemon is drained) is tried again until the deadline; any
other failure is its answer. Whatever is not answered when the daemon ends is run by the next one. Must not
know HTTP, nor how things are kept (`store`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import msgspec
from aiohttp import web

from seallmd.api.batch.batches import Line, output_line
from seallmd.api.batch.life import Status
from seallmd.api.batch.lines import LineBody, examine
from seallmd.api.batch.records import BatchRecord, LineError
from seallmd.api.batch.store import Store
from seallmd.api.batch.teller import Teller
from seallmd.api.keys import Key, Keyring, current_key
from seallmd.api.problems import INTERNAL, error_body
from seallmd.api.tiers import in_batch
from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

Endpoint = Callable[[bytes], Awaitable[web.StreamResponse]]  # a body to a whole response; raises RequestError

_PAGE_LINES = 64
_LOOK_SECONDS = 60.0  # deadlines are times of day, and clocks are set
_SWEEP_SECONDS = 3600.0
_FULL_SECONDS = 5.0  # until a full disk is tried again
_MOST_TRIES = 5  # of a line that fails in passing, unless that has nothing to do with it
_MOST_RETRY_SECONDS = 60.0
_NOT_ITS_FAULT = frozenset({"draining", "shutting_down", "overloaded", "model_loading", "model_unavailable"})


class BatchFailed(Exception):
    """A batch cannot go on, with the reasons."""

    def __init__(self, *errors: LineError) -> None:
        super().__init__(errors)
        self.errors = errors


class Runner:
    """Runs every batch that is not over, from `start` to `close`.

    endpoints: by path. look_up: raises RequestError when the key at hand has no such model. teller: is told
    of every batch whose status changes, and of every line that ends.
    """

    def __init__(
        self,
        store: Store,
        endpoints: Mapping[str, Endpoint],
        look_up: Callable[[str], object],
        keyring: Keyring,
        teller: Teller,
    ) -> None:
        self.endpoints = endpoints
        self._store = store
        self._look_up = look_up
        self._keyring = keyring
        self._teller = teller
        self._slots = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(store.settings.in_flight))
        self._working: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False

    async def start(self) -> None:
        """Go on with what the daemon before has left."""
        if not self._store.is_open:
            return
        self._started = True
        self._spawn(self._sweep())
        for record in await self._store(lambda _, batches: batches.unfinished()):
            self.submit(record)

    async def close(self) -> None:
        """Stop at once: lines that are in flight are run again by the next daemon."""
        self._started = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, record: BatchRecord) -> None:
        """Run a batch. One that comes before `start` is found by that."""
        if self._started:
            self._spawn(self._run(record))

    def cancel(self, record: BatchRecord) -> None:
        """It is being cancelled: have its lines stop."""
        if record.id in self._working:
            self._working[record.id].cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------------------- one batch

    async def _run(self, record: BatchRecord) -> None:
        try:
            errors = await self._until_deadline(record)
            await self._conclude(record.id, errors)
        except Exception:  # noqa: BLE001 - the others go on; this one does at the next start
            _log.exception("%s cannot go on", record.id)

    async def _until_deadline(self, record: BatchRecord) -> tuple[LineError, ...]:
        """Work on it until it is done, cancelled or late; why it failed, if it did."""
        work = self._working[record.id] = asyncio.create_task(self._work(record))
        try:
            while not work.done() and (left := record.deadline - time.time()) > 0:
                await asyncio.wait((work,), timeout=min(left, _LOOK_SECONDS))
        finally:
            del self._working[record.id]
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if work.cancelled() or (error := work.exception()) is None:
            return ()
        if isinstance(error, BatchFailed):
            return error.errors
        raise error

    async def _work(self, record: BatchRecord) -> None:
        """Raises BatchFailed."""
        if record.status is Status.VALIDATING:
            record = await self._begin(record)
        if record.status is not Status.IN_PROGRESS:
            return
        key, number = self._key_of(record), 0
        try:
            async with asyncio.TaskGroup() as group:
                while lines := await self._pending(record.id, number):
                    for line in lines:
                        number = line.number
                        await self._slots[line.model].acquire()
                        group.create_task(self._answer_line(record, line, key))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _pending(self, batch: str, number: int) -> list[Line]:
        return await self._store(lambda _, batches: batches.pending(batch, number, _PAGE_LINES))

    async def _begin(self, record: BatchRecord) -> BatchRecord:
        """Examine the input. Raises BatchFailed."""
        path = await self._store(lambda files, _: files.path(record.input_file_id))
        try:
            found = await asyncio.to_thread(examine, path, record.endpoint, self._store.settings)
        except OSError as error:
            raise BatchFailed(LineError("file_not_found", "the input file is gone")) from error
        errors = found.errors or self._unknown_models(record, found.models)
        if errors:
            raise BatchFailed(*errors)
        try:
            record = await self._store(lambda _, batches: batches.begin(record.id, found.lines))
        except ValueError:  # it was cancelled meanwhile
            return await self._store(lambda _, batches: batches.get(record.id))
        self._teller.changed(record)
        return record

    def _unknown_models(self, record: BatchRecord, models: Mapping[str, int]) -> list[LineError]:
        errors, token = [], current_key.set(self._key_of(record))
        try:
            for model, line in models.items():
                try:
                    self._look_up(model)
                except RequestError as error:
                    errors.append(LineError(error.code or "", str(error), line, "body.model"))
        finally:
            current_key.reset(token)
        return errors

    def _key_of(self, record: BatchRecord) -> Key | None:
        """Whose lines these are. Raises BatchFailed when that key is not known any more."""
        if not record.owner or not self._keyring.required:
            return None
        key = self._keyring.named(record.owner)
        if key is None:
            raise BatchFailed(LineError("invalid_api_key", "the API key of this batch is no longer known"))
        return key

    async def _conclude(self, batch: str, errors: tuple[LineError, ...]) -> None:
        """Bring a batch on which nobody works any more to its end, as soon as there is room for its files."""
        while True:
            try:
                record = await self._store(lambda _, batches: batches.get(batch))
                if record.is_over:
                    return
                record = await self._advance(record, self._next_event(record, errors), errors)
                self._teller.changed(record)
            except RequestError as error:
                _log.warning("%s cannot end yet: %s", batch, error)
                await asyncio.sleep(_FULL_SECONDS)

    async def _advance(self, record: BatchRecord, event: str, errors: tuple[LineError, ...]) -> BatchRecord:
        if event == "answered":
            return await self._store(lambda _, batches: batches.move(record.id, event))
        record = await self._store(lambda _, batches: batches.end(record.id, event, errors))
        self._count_unrun(record)
        return record

    def _next_event(self, record: BatchRecord, errors: tuple[LineError, ...]) -> str:
        if record.status is Status.CANCELLING:
            return "stop"
        if record.status is Status.FINALIZING:
            return "complete"
        if errors:
            return "fail"
        done = record.status is Status.IN_PROGRESS and record.completed + record.failed == record.total
        return "answered" if done else "expire"

    def _count_unrun(self, record: BatchRecord) -> None:
        if unrun := record.total - record.completed - record.failed:
            self._teller.counted("failed" if record.status is Status.FAILED else record.status.value, unrun)

    # ------------------------------------------------------------------------------- one line

    async def _answer_line(self, record: BatchRecord, line: Line, key: Key | None) -> None:
        """Have a line answered, and keep the answer; its slot is free when this ends."""
        try:
            current_key.set(key)
            in_batch.set(True)
            status, body = await self._tried(record, line)
            response = {
                "status_code": status,
                "request_id": f"req_{uuid.uuid4().hex}",
                "body": msgspec.Raw(body),
            }
            good = status == 200
            answer = output_line(record.id, line.number, line.custom_id, response=response)
            if await self._keep(record.id, line.number, answer, good=good):
                self._teller.counted("completed" if good else "failed")
        finally:
            self._slots[line.model].release()

    async def _tried(self, record: BatchRecord, line: Line) -> tuple[int, bytes]:
        """Status and body of what the endpoint says in the end."""
        try:
            raw = await self._store(lambda _, batches: batches.content(record.id, line))
        except OSError:
            raise BatchFailed(LineError("file_not_found", "the input file is gone")) from None
        body, tries = bytes(msgspec.json.decode(raw, type=LineBody).body), 0
        while True:
            try:
                response = await self.endpoints[record.endpoint](body)
            except RequestError as error:
                tries += error.code not in _NOT_ITS_FAULT
                if error.retry_after is None or tries >= _MOST_TRIES:
                    return error.status, error_body(error)
                await asyncio.sleep(min(error.retry_after, _MOST_RETRY_SECONDS))
            except Exception:  # noqa: BLE001 - as for a request over HTTP: the line gets an answer, the log why
                _log.exception("line %d of %s failed", line.number, record.id)
                return INTERNAL.status, error_body(INTERNAL)
            else:
                assert isinstance(response, web.Response)
                assert isinstance(response.body, bytes)
                return response.status, response.body

    async def _keep(self, batch: str, number: int, answer: bytes, *, good: bool) -> bool:
        """Store an answer; while the disk is full, wait with it."""
        while True:
            try:
                return await self._store(lambda _, batches: batches.answer(batch, number, answer, good=good))
            except RequestError as error:
                _log.warning("an answer of %s has to wait: %s", batch, error)
                await asyncio.sleep(_FULL_SECONDS)

    # ------------------------------------------------------------------------------- old things

    async def _sweep(self) -> None:
        """Remove what has been kept for long enough, now and then."""
        while True:
            with contextlib.suppress(RequestError):
                await self._store(lambda files, _: files.remove_expired())
                await self._store(lambda _, batches: batches.forget_old())
            await asyncio.sleep(_SWEEP_SECONDS)

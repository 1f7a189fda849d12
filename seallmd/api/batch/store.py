"""Files and batches for the event loop: every call runs in one thread, in the order in which they were made.

Owns that thread, and what is told when the state directory cannot be used. Must not know what calls do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from seallmd.api.batch.batches import Batches
from seallmd.api.batch.database import Database, StateUnusable
from seallmd.api.batch.files import Files
from seallmd.api.settings import BatchSettings
from seallmd.errors import RequestError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Call = Callable[[Files, Batches], Result]


class Store:
    """Files and batches on disk, from `open` to `close`."""

    def __init__(self, settings: BatchSettings, directory: Path) -> None:
        self.settings = settings
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._database: Database | None = None
        self._trouble = "they are not open yet"

    async def open(self) -> None:
        """Open the directory. Where that fails, the log says why, and so does every call from then on."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except StateUnusable as error:
            self._trouble = "their directory cannot be used"
            _log.warning("there are no files and batches: %s", error)

    def _open(self) -> None:
        self._database = Database(self._directory)
        self._files = Files(self._database, self.settings)
        self._batches = Batches(self._database, self._files, self.settings)

    @property
    def is_open(self) -> bool:
        """Whether anything can be stored."""
        return self._database is not None

    async def close(self) -> None:
        """Finish what has been asked for, and let another daemon have the directory."""
        database, self._database = self._database, None
        if database is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, database.close)
        self._thread.shutdown()

    async def __call__(self, call: Call[Result]) -> Result:
        """Make a call; it goes on when whoever waits leaves. Raises RequestError, and what the call does."""
        if self._database is None:
            message = f"files and batches are not served here: {self._trouble}"
            raise RequestError(message, status=503, code="batches_unavailable")
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: call(self._files, self._batches)
        )

"""A helper process: one job at a time, a line of JSON each way, killed when it takes too long.

Owns the process and its limit in time; limits in memory are the process's own. For work on foreign input that
might never end or fill the memory: a process can be limited and killed, a thread cannot. Must not know jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Generic, TypeVar

import msgspec

Reply = TypeVar("Reply")


class HelperFailed(Exception):
    """The process ended without an answer."""


class HelperProcess(Generic[Reply]):
    """`python -m MODULE`, started when first needed and again whenever it is gone."""

    def __init__(self, module: str, reply: type[Reply], *, seconds: float, line_bytes: int) -> None:
        """reply: struct of an answer. seconds: limit of one job. line_bytes: of an answer."""
        self._module, self._reply = module, reply
        self.seconds, self._line_bytes = seconds, line_bytes
        self._turn = asyncio.Lock()
        self.process: asyncio.subprocess.Process | None = None

    async def ask(self, job: msgspec.Struct) -> Reply:
        """The answer to a job. Raises TimeoutError and HelperFailed."""
        line = msgspec.json.encode(job) + b"\n"
        async with self._turn:
            if self.process is not None and self.process.returncode is not None:
                await self._stop()  # somebody killed it between two jobs
            try:
                return await self._ask(line)
            except BaseException:
                # A late answer must not be taken for the next one: half-used, the process is of no use.
                await self._stop()
                raise

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._stop()

    async def _ask(self, line: bytes) -> Reply:
        process = self.process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(self.seconds):
                process.stdin.write(line)
                await process.stdin.drain()
                answer = await process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise HelperFailed(self._module)
        return msgspec.json.decode(answer, type=self._reply)

    async def _start(self) -> asyncio.subprocess.Process:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=self._line_bytes,
            start_new_session=True,  # a terminal's Ctrl-C is for the daemon, which ends this process itself
        )
        return self.process

    async def _stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        assert process.stdin is not None
        process.stdin.close()

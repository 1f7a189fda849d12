"""/v1/files and /v1/batches, in OpenAI's shapes.

Owns reading what clients send, an upload as it arrives included, and whose things they may see: their key's.
Must not know how batches are run or kept.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import msgspec
from aiohttp import BadContentDispositionHeader, BadContentDispositionParam, BodyPartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Meta

from seallmd.api.batch.batches import Batches
from seallmd.api.batch.files import Files, Partial, no_room
from seallmd.api.batch.records import (
    BatchList,
    BatchRecord,
    Deleted,
    FileList,
    FileRecord,
    batch_object,
    file_object,
)
from seallmd.api.batch.runner import Runner
from seallmd.api.batch.store import Store
from seallmd.api.fields import decode_body
from seallmd.api.keys import current_key
from seallmd.api.serving import json_response, read_body
from seallmd.errors import RequestError

PURPOSE = "batch"
_CHUNK_BYTES = 1 << 20
_FIELD_BYTES = 1024
# What aiohttp says of bodies that are no form; the warnings are errors where somebody made them so.
_NO_FORM = (
    *(ValueError, AssertionError, LookupError, HttpProcessingError),
    *(BadContentDispositionHeader, BadContentDispositionParam),
)
_UPLOADS = 8  # at the same time
_STALL_SECONDS = 60.0
_WINDOW = re.compile(r"^([1-9][0-9]{0,5})([smhd])$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_WINDOW_SECONDS = 30 * 86400
_MOST_EXPIRY_SECONDS = 30 * 86400
_LEAST_EXPIRY_SECONDS = 3600


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/batches. completion_window: until when it is to be done, such as "24h", "90m" or "7d"."""

    input_file_id: Annotated[str, Meta(min_length=1, max_length=64)]
    endpoint: Annotated[str, Meta(min_length=1, max_length=64)]
    completion_window: Annotated[str, Meta(max_length=16)]
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None


class BatchRoutes:
    """The endpoints."""

    def __init__(self, store: Store, runner: Runner) -> None:
        self._store = store
        self._runner = runner
        self._uploads = self._uploading = 0  # how many, and bytes of them that are on disk

    def routes(self) -> list[web.RouteDef]:
        """Everything below /v1/files and /v1/batches."""
        return [
            web.post("/v1/files", self.upload),
            web.get("/v1/files", self.files),
            web.get("/v1/files/{name}", self.file),
            web.get("/v1/files/{name}/content", self.content),
            web.delete("/v1/files/{name}", self.delete),
            web.post("/v1/batches", self.create),
            web.get("/v1/batches", self.batches),
            web.get("/v1/batches/{name}", self.batch),
            web.post("/v1/batches/{name}/cancel", self.cancel),
        ]

    # ------------------------------------------------------------------------------- files

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files: a form with `file` and `purpose`."""
        if request.content_type != "multipart/form-data":
            raise RequestError("the body must be multipart/form-data", status=415)
        if self._uploads >= _UPLOADS:
            raise RequestError("too many files are uploaded now", status=503, retry_after=2.0)
        self._uploads += 1
        upload = _Upload(self._store, self._reserve)
        try:
            await upload.read(request)
            return json_response(file_object(await upload.keep(_owner())))
        finally:
            self._uploads -= 1
            self._uploading -= upload.reserved
            await asyncio.shield(upload.drop())

    async def _reserve(self, bytes_: int) -> None:
        """Before so many bytes of an upload are written: there is to be room for all that arrive now."""
        room = await self._store(lambda files, _: files.room())
        if self._uploading + bytes_ > room:
            raise no_room(self._store.settings)
        self._uploading += bytes_

    async def files(self, request: web.Request) -> web.Response:
        """GET /v1/files."""
        after, limit = _page(request, 10_000)
        order = request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError("`order` is asc or desc", param="order")
        purpose, owner = request.query.get("purpose", ""), _owner()

        def look(files: Files, _: Batches) -> list[FileRecord]:
            return files.some(owner, purpose, after, limit + 1, oldest_first=order == "asc")

        found = await self._store(look)
        shown = [file_object(record) for record in found[:limit]]
        first, last = _ends(found[:limit])
        return json_response(FileList(data=shown, first_id=first, last_id=last, has_more=len(found) > limit))

    async def file(self, request: web.Request) -> web.Response:
        """GET /v1/files/{file_id}."""
        name, owner = request.match_info["name"], _owner()
        return json_response(file_object(await self._store(lambda files, _: files.find(owner, name))))

    async def content(self, request: web.Request) -> web.FileResponse:
        """GET /v1/files/{file_id}/content."""
        name, owner = request.match_info["name"], _owner()
        path = await self._store(lambda files, _: files.path(files.find(owner, name).id))
        headers = {"Content-Type": "application/octet-stream", "X-Content-Type-Options": "nosniff"}
        return web.FileResponse(path, headers=headers)

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/{file_id}."""
        name, owner = request.match_info["name"], _owner()
        await self._store(lambda files, _: files.delete(owner, name))
        return json_response(Deleted(id=name))

    # ------------------------------------------------------------------------------- batches

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/batches."""
        wanted, owner = decode_body(await read_body(request), BatchRequest), _owner()
        if wanted.endpoint not in self._runner.endpoints:
            served = ", ".join(self._runner.endpoints)
            raise RequestError(f"`endpoint` is one of {served}", code="invalid_endpoint", param="endpoint")
        window = wanted.completion_window, _window_seconds(wanted.completion_window)

        def create(_: Files, batches: Batches) -> BatchRecord:
            return batches.create(owner, wanted.endpoint, wanted.input_file_id, window, wanted.metadata)

        record = await asyncio.shield(self._create(create))
        return json_response(batch_object(record))

    async def _create(self, create: Callable[[Files, Batches], BatchRecord]) -> BatchRecord:
        """Whole, even when the client leaves: what is there is run."""
        record = await self._store(create)
        self._runner.submit(record)
        return record

    async def batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches."""
        (after, limit), owner = _page(request, 100, 20), _owner()
        found = await self._store(lambda _, batches: batches.some(owner, after, limit + 1))
        shown = [batch_object(record) for record in found[:limit]]
        first, last = _ends(found[:limit])
        return json_response(BatchList(data=shown, first_id=first, last_id=last, has_more=len(found) > limit))

    async def batch(self, request: web.Request) -> web.Response:
        """GET /v1/batches/{batch_id}."""
        name, owner = request.match_info["name"], _owner()
        return json_response(batch_object(await self._store(lambda _, batches: batches.find(owner, name))))

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/batches/{batch_id}/cancel."""
        name, owner = request.match_info["name"], _owner()
        record = await self._store(lambda _, batches: batches.cancel(owner, name))
        self._runner.cancel(record)
        return json_response(batch_object(record))


class _Upload:
    """A form as it arrives. reserved: bytes of the file that room was taken for."""

    def __init__(self, store: Store, reserve: Callable[[int], Awaitable[None]]) -> None:
        self.reserved = 0
        self._store = store
        self._reserve = reserve
        self._partial: Partial | None = None
        self._filename = ""
        self._fields: dict[str, str] = {}

    async def read(self, request: web.Request) -> None:
        """Read all of it. Raises RequestError."""
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    raise RequestError("a part of the form is a form itself")
                if part.name == "file":
                    await self._read_file(part)
                else:
                    self._fields[part.name or ""] = await _text(part)
                if len(self._fields) > 16:
                    raise RequestError("the form has too many fields")
        except _NO_FORM as error:
            raise RequestError("the body is not a well-formed form") from error
        if self._fields.get("purpose") != PURPOSE:
            raise RequestError(f"`purpose` must be {PURPOSE!r}", param="purpose")
        if self._partial is None:
            raise RequestError("the form has no `file`", param="file")

    async def _read_file(self, part: BodyPartReader) -> None:
        if self._partial is not None:
            raise RequestError("the form has more than one `file`", param="file")
        if hdrs.CONTENT_ENCODING in part.headers or part.headers.get(
            hdrs.CONTENT_TRANSFER_ENCODING, "binary"
        ) not in (*("binary", "8bit", "7bit"),):
            raise RequestError("the file must be sent as it is", status=415, param="file")
        name = (part.filename or "upload.jsonl")[:255]
        self._filename = name.encode(errors="replace").decode()  # bytes that are no UTF-8
        partial = self._partial = await self._store(lambda files, _: files.partial())
        most, waiting = self._store.settings.max_file_bytes, bytearray()
        while chunk := await _chunk(part, _CHUNK_BYTES // 16):
            waiting += chunk
            if self.reserved + len(waiting) > most:
                raise RequestError(f"a file may have {most} bytes", status=413, code="file_too_large")
            if len(waiting) >= _CHUNK_BYTES:
                await self._write(partial, waiting)
        await self._write(partial, waiting)
        await asyncio.to_thread(partial.finish)

    async def _write(self, partial: Partial, waiting: bytearray) -> None:
        data = bytes(waiting)
        await self._reserve(len(data))
        self.reserved += len(data)
        waiting.clear()
        await asyncio.to_thread(partial.write, data)

    async def keep(self, owner: str) -> FileRecord:
        """Give it its name."""
        assert self._partial is not None
        partial, name, seconds = self._partial, self._filename, self._expiry()
        return await self._store(lambda files, _: files.keep(owner, partial, name, PURPOSE, seconds))

    def _expiry(self) -> float | None:
        """OpenAI's `expires_after`, from when the file was made."""
        anchor = self._fields.get("expires_after[anchor]")
        seconds = self._fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        right = anchor == "created_at" and seconds is not None and seconds.isascii() and seconds.isdecimal()
        if not right or not _LEAST_EXPIRY_SECONDS <= int(seconds or 0) <= _MOST_EXPIRY_SECONDS:
            message = (
                f"`expires_after` is created_at and {_LEAST_EXPIRY_SECONDS} to {_MOST_EXPIRY_SECONDS} seconds"
            )
            raise RequestError(message, param="expires_after")
        return float(seconds or 0)

    async def drop(self) -> None:
        """Remove what is left of it, if it was not kept."""
        if self._partial is not None:
            await asyncio.to_thread(self._partial.drop)


async def _chunk(part: BodyPartReader, most: int) -> bytes:
    """More of a part; a client that sends nothing for long makes room for others."""
    try:
        async with asyncio.timeout(_STALL_SECONDS):
            return await part.read_chunk(most)
    except TimeoutError:
        raise RequestError("the upload has stalled", status=408) from None


async def _text(part: BodyPartReader) -> str:
    """A field that is no file."""
    text = bytearray()
    while chunk := await _chunk(part, _FIELD_BYTES):
        text += chunk
        if len(text) > _FIELD_BYTES:
            raise RequestError(f"a field of the form is longer than {_FIELD_BYTES} bytes", param=part.name)
    return text.decode()


def _owner() -> str:
    """Whose files and batches: the key's, by its name."""
    key = current_key.get()
    return "" if key is None else key.name


def _page(request: web.Request, most: int, default: int | None = None) -> tuple[str, int]:
    """`after` and `limit` of a list. Raises RequestError."""
    limit = request.query.get("limit", str(default or most))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 8 and 1 <= int(limit) <= most):
        raise RequestError(f"`limit` is a number from 1 to {most}", param="limit")
    return request.query.get("after", "")[:64], int(limit)


def _ends(page: Sequence[FileRecord | BatchRecord]) -> tuple[str | None, str | None]:
    """The ids of the first and the last of a page."""
    return (page[0].id, page[-1].id) if page else (None, None)


def _window_seconds(window: str) -> float:
    match = _WINDOW.match(window)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _MOST_WINDOW_SECONDS:
        message = '`completion_window` is a time such as "24h", "90m" or "7d", at most 30 days'
        raise RequestError(message, code="invalid_completion_window", param="completion_window")
    return float(seconds)

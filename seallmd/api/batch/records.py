"""What is kept of files and batches, and how clients see it: OpenAI's objects.

Owns these shapes. Must not know where they are kept.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from seallmd.api.batch.life import OVER, Status


class FileRecord(msgspec.Struct, frozen=True):
    """A file. owner: the name of its API key, empty when none was needed. Times: seconds since 1970."""

    id: str
    owner: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file as clients see it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None
    object: str = "file"
    status: str = "processed"
    status_details: str | None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """Files, the newest first unless they were asked for otherwise."""

    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A file is gone."""

    id: str
    object: str = "file"
    deleted: bool = True


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with the input of a batch. line: counted from 1, None when it is no single one."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True):
    """A batch. deadline: expires_at of the object. times: when it came into each status.

    total, completed, failed: lines. The rest as in the object.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    deadline: float
    status: Status
    times: dict[str, int] = {}
    metadata: dict[str, str] | None = None
    errors: list[LineError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.status in OVER


class Counts(msgspec.Struct, frozen=True):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class ErrorList(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed."""

    data: list[LineError]
    object: str = "list"


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as clients see it."""

    id: str
    endpoint: str
    errors: ErrorList | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None
    object: Literal["batch"] = "batch"


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """Batches, the newest first."""

    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


def file_object(record: FileRecord) -> FileObject:
    """As clients see it."""
    shown = {field: getattr(record, field) for field in record.__struct_fields__ if field != "owner"}
    return FileObject(**shown)


def batch_object(record: BatchRecord) -> BatchObject:
    """As clients see it."""
    times: dict[str, Any] = {f"{status.value}_at": record.times.get(status.value) for status in Status}
    del times["validating_at"]  # that is created_at
    return BatchObject(
        id=record.id,
        endpoint=record.endpoint,
        errors=ErrorList(data=record.errors) if record.errors else None,
        input_file_id=record.input_file_id,
        completion_window=record.completion_window,
        status=record.status,
        output_file_id=record.output_file_id,
        error_file_id=record.error_file_id,
        created_at=record.created_at,
        expires_at=int(record.deadline),
        request_counts=Counts(record.total, record.completed, record.failed),
        metadata=record.metadata,
        **times,
    )

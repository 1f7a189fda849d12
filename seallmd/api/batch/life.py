"""The life of a batch: its states in OpenAI's words, and the legal ways between them.

Owns the table. Must not know why anything happens, nor where it is kept.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_LIFE = {
    (Status.VALIDATING, "begin"): Status.IN_PROGRESS,
    (Status.VALIDATING, "fail"): Status.FAILED,
    (Status.VALIDATING, "cancel"): Status.CANCELLING,
    (Status.VALIDATING, "expire"): Status.EXPIRED,
    (Status.IN_PROGRESS, "answered"): Status.FINALIZING,
    (Status.IN_PROGRESS, "fail"): Status.FAILED,
    (Status.IN_PROGRESS, "cancel"): Status.CANCELLING,
    (Status.IN_PROGRESS, "expire"): Status.EXPIRED,
    (Status.FINALIZING, "complete"): Status.COMPLETED,
    (Status.CANCELLING, "stop"): Status.CANCELLED,
}

OVER = frozenset({Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED})


def after(status: Status, event: str) -> Status:
    """The next state. Raises ValueError for what the table does not have."""
    try:
        return BATCH_LIFE[status, event]
    except KeyError:
        raise ValueError(f"a batch that is {status.value} cannot {event}") from None

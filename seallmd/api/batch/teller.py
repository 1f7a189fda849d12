"""Tells of batches: to the log, to those who follow events, and in metrics.

Owns the wording. Must not decide anything.
"""

from __future__ import annotations

import logging

from seallmd.api.batch.records import BatchRecord
from seallmd.api.metrics import Metrics
from seallmd.runtime.feed import EventFeed

_log = logging.getLogger(__name__)


class Teller:
    """What `Runner` tells."""

    def __init__(self, feed: EventFeed, metrics: Metrics) -> None:
        self._feed = feed
        self._metrics = metrics

    def changed(self, record: BatchRecord) -> None:
        """A batch came into another status."""
        lines = f"{record.completed} of {record.total} lines answered, {record.failed} failed"
        text = f"{record.id} is {record.status.value}: {lines}"
        _log.info("%s", text)
        self._feed.tell("batch", "", text)

    def counted(self, outcome: str, lines: int = 1) -> None:
        """So many lines ended."""
        self._metrics.batch_lines.labels(outcome).inc(lines)

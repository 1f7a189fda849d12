"""The child's end of the socket to the daemon.

Owns framing, the reader thread and the order of messages. Must not know what the messages mean.
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any

from seallmd.core.framing import Unframer, frame
from seallmd.core.messages import Message

_READ_BYTES = 1 << 18


class Closed(Exception):
    """The daemon closed the socket, or said something that cannot be decoded (then `__cause__` says what)."""


class Channel:
    """Messages in and out over one stream socket; `post` lets other threads of this process add their own.

    kind: the union of messages that the daemon may send.
    """

    def __init__(self, sock: socket.socket, kind: object) -> None:
        self._sock = sock
        self._unframer = Unframer(kind)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._end: Closed | None = None
        self._reader = threading.Thread(target=self._read, name="reader", daemon=True)
        self._reader.start()

    def send(self, message: Message) -> None:
        """Write one message. Raises Closed when nobody reads any more."""
        data = frame(message)
        try:
            with self._sending:
                self._sock.sendall(data)
        except OSError as error:
            raise Closed from error

    def post(self, item: Any) -> None:
        """Put an item of this process's own into the inbox."""
        self._inbox.put(item)

    def get(self, timeout: float | None = None) -> Any | None:
        """The next item in order of arrival, None after `timeout` seconds; 0 does not wait.

        Raises Closed as soon as the socket is closed, whatever still waits: nobody wants the answers.
        """
        try:
            item = self._inbox.get(block=timeout != 0, timeout=timeout or None)
        except queue.Empty:
            item = None
        if self._end is not None:
            raise self._end
        return item

    def _read(self) -> None:
        end = Closed()
        try:
            while data := self._sock.recv(_READ_BYTES):
                for message in self._unframer.feed(data):
                    self._inbox.put(message)
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            end.__cause__ = error
        self._end = end
        self._inbox.put(None)  # wakes a waiting `get`

"""Talking to the daemon over HTTP: on TCP or on its Unix socket.

Owns connections, status codes and server-sent events. Must not know terminals, nor import anything of the
daemon.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Generator, Iterable
from typing import Any
from urllib.parse import urlsplit

from seallmd.errors import ControlError, Unreachable

CONNECT_SECONDS = 10.0
KEY_VARIABLE = "SEALLMD_API_KEY"  # in the environment: arguments can be read by others
_UNIX = "unix:"
_HERE = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::"})


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Instead of a name and a port."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def choose(addresses: list[str]) -> str:
    """The address to use of those that the daemon told. Raises ControlError when there is none."""
    if not addresses:
        raise ControlError("the daemon does not tell where it serves HTTP; say it with --url")
    return next((address for address in addresses if address.startswith(_UNIX)), addresses[0])


def get(address: str, path: str) -> tuple[int, bytes]:
    """Status and body of a GET. Raises Unreachable."""
    with _Call(address, "GET", path, None) as response:
        return response.status, response.read()


def stream(address: str, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """The chunks of a completion as they come. Raises Unreachable, or ControlError for a refusal."""
    with _Call(address, "POST", path, {**body, "stream": True}) as response:
        if response.status != 200:
            raise ControlError(_message(response.read()) or f"HTTP status {response.status}")
        yield from read_chunks(response)


def read_chunks(lines: Iterable[bytes]) -> Generator[dict[str, Any], None, None]:
    """The chunks of a stream of server-sent events. Raises ControlError for an error among them, and for
    what is no stream of ours."""
    for line in lines:
        data = line.strip().removeprefix(b"data: ")
        if data == line.strip() or data == b"[DONE]":
            continue  # a blank line, a comment, or the end
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise ControlError("the answer is not one of seallmd's")
        if "error" in chunk:
            raise ControlError(_message(data) or "the server failed")
        yield chunk


class _Call:
    """One request on a connection of its own; leaving the block hangs up, which ends its generation."""

    def __init__(self, address: str, method: str, path: str, body: dict[str, Any] | None) -> None:
        self._address = address
        self._connection = _connection(address)
        self._method, self._path = method, path
        self._body = None if body is None else json.dumps(body).encode()

    def __enter__(self) -> http.client.HTTPResponse:
        headers = {} if self._body is None else {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._connection.connect()
            assert self._connection.sock is not None
            # A model may have to come in first: only the connection has a limit.
            self._connection.sock.settimeout(None)
            self._connection.request(self._method, self._path, self._body, headers)
            return self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(f"no HTTP answer on {self._address}: {_reason(error)}") from None
        except BaseException:  # Ctrl-C while the model comes in: hang up, so that nothing is generated
            self._connection.close()
            raise

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._connection.close()
        if isinstance(error, (OSError, http.client.HTTPException, ValueError)):
            raise Unreachable(f"the answer of {self._address} broke off") from None


def _connection(address: str) -> http.client.HTTPConnection:
    if address.startswith(_UNIX):
        return _UnixConnection(address.removeprefix(_UNIX))
    url = urlsplit(address)
    try:
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError
        if url.scheme == "https":
            context = _tls(url.hostname)
            port = url.port or 443
            return http.client.HTTPSConnection(url.hostname, port, timeout=CONNECT_SECONDS, context=context)
        return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=CONNECT_SECONDS)
    except ValueError:
        raise ControlError(f"no address of seallmd: {address!r} (http://HOST:PORT or unix:PATH)") from None


def _tls(host: str) -> ssl.SSLContext:
    """Certificates are verified, but on this machine: there they are for the name that others use."""
    context = ssl.create_default_context()
    if host in _HERE:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

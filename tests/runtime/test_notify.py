"""systemd's two protocols as the daemon speaks them: what is told, what is taken over, what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from seallmd.errors import ConfigError
from seallmd.runtime.notify import Notifier, take_listeners, take_notifier

NAMES = ("http", "control")


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_what_is_told(tmp_path: Path, kind: str) -> None:
    """Over both kinds of address; a sentence stays one line and is told once."""
    address = str(tmp_path / "notify") if kind == "path" else f"@seallmd-unit-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(address.replace("@", "\0"))
        notifier = Notifier(address)
        notifier.status("one\ntwo")
        notifier.status("one two")
        notifier.extend(1.5)
        assert [manager.recv(100) for _ in range(2)] == [b"STATUS=one two", b"EXTEND_TIMEOUT_USEC=1500000"]


def test_telling_never_fails(tmp_path: Path) -> None:
    """Nobody there, nobody any more, and one who does not read: the daemon goes on, without waiting."""
    Notifier().ready()
    Notifier(str(tmp_path / "gone")).ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        notifier = Notifier(str(tmp_path / "deaf"))
        for _ in range(1000):
            notifier.alive()


def test_the_environment_is_taken() -> None:
    """Removed, or every child would tell systemd things; a watchdog of another process is not ours."""
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "2000000", "HOME": "/root"}
    assert take_notifier(environment).watchdog_seconds == 2.0
    assert environment == {"HOME": "/root"}
    assert take_notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_seconds == 0.0
    assert take_notifier({"WATCHDOG_USEC": "soon"}).watchdog_seconds == 0.0


def given(count: int, names: str, pid: int | None = None) -> dict[str, str]:
    """The environment of a daemon that was handed sockets."""
    pid = os.getpid() if pid is None else pid
    return {"LISTEN_FDS": str(count), "LISTEN_PID": str(pid), "LISTEN_FDNAMES": names}


def test_listeners_go_by_their_names() -> None:
    """Several of one name, in order, from descriptor 3 on; the variables are removed."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        open_ = {3: one, 4: two}.__getitem__
        environment = given(2, "http:http")
        assert take_listeners(environment, NAMES, open_) == {"http": [one, two], "control": []}
        assert environment == {}
        assert not one.get_inheritable()


def test_sockets_of_another_process_are_not_taken() -> None:
    """Descriptor 3 is then something else of ours."""
    none = {"http": [], "control": []}
    assert take_listeners(given(1, "http", pid=1), NAMES, {}.__getitem__) == none
    assert take_listeners({}, NAMES, {}.__getitem__) == none


@pytest.mark.parametrize("names", ["", "web", 1000 * "web"])
def test_a_socket_without_a_place_is_refused(names: str) -> None:
    """Serving control where HTTP was meant would give models away, or the other way round."""
    with socket.socket() as sock, pytest.raises(ConfigError, match="http or control") as refusal:
        take_listeners(given(1, names), NAMES, {3: sock}.__getitem__)
    assert len(str(refusal.value)) < 200


def test_a_socket_that_does_not_listen_is_refused() -> None:
    """A unit with Accept=yes hands over connections."""
    with socket.socket() as sock, pytest.raises(ConfigError, match="does not accept"):
        take_listeners(given(1, "http"), NAMES, {3: sock}.__getitem__)

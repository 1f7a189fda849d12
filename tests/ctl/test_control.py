"""The control socket: its protocol, who may speak, and what becomes of its file."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from seallmd import __version__, paths
from seallmd.api import control as control_module
from seallmd.api.control import MAX_LINE_BYTES, ControlServer, may_speak
from seallmd.errors import ControlError
from tests.ctl.conftest import FakeNode


async def say(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    """Send lines over one connection and read all that comes until it ends."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"".join(line + b"\n" for line in lines))
    writer.write_eof()
    replies = [json.loads(line) for line in (await reader.read()).splitlines()]
    writer.close()
    return replies


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_commands(control: Path, node: FakeNode) -> None:
    """Several commands on one connection, answered in order."""
    status, *rest = await say(
        control,
        b'{"op":"status"}',
        b'{"op":"evict","service":"quick","now":true}',
        b'{"op":"evict","service":"quick"}',
    )
    assert status["kind"] == "status"
    assert [entry["name"] for entry in status["status"]["services"]] == ["quick", "slow", "busy[red]", "odd"]
    assert status["status"]["devices"][0]["capacity_bytes"] == 2 << 30
    assert [reply for reply in rest if reply["kind"] != "progress"] == [{"kind": "ok"}] * 2
    assert node.evicted == [("quick", True), ("quick", False)]


async def test_the_daemon_itself(server: ControlServer, control: Path) -> None:
    """Whoever finds the control socket finds HTTP too."""
    server.http = ("http://127.0.0.1:8000", "unix:/run/http.sock")
    (status,) = await say(control, b'{"op":"status"}')
    assert status["daemon"] == {"version": __version__, "pid": os.getpid(), "http": list(server.http)}


async def test_show(control: Path) -> None:
    """One service with its shape, places and learnt costs."""
    known, unknown = await say(
        control, b'{"op":"show","service":"busy[red]"}', b'{"op":"show","service":"nobody"}'
    )
    assert known["kind"] == "service"
    detail = known["service"]
    assert detail["shape"]["architecture"] == "LlamaForCausalLM"
    assert detail["kv_bytes_per_token"] == 2 * 32 * 8 * 256
    assert detail["places"][0]["running"] == 3
    assert detail["profile"]["costs"]["steps"] == 77
    assert unknown == {"kind": "error", "message": "there is no service 'nobody'"}


async def test_requests_and_cancel(control: Path, node: FakeNode) -> None:
    """What runs and waits; only what is there can be cancelled."""
    listed, done, unknown = await say(
        control, b'{"op":"requests"}', b'{"op":"cancel","request":9}', b'{"op":"cancel","request":8}'
    )
    assert [(r["request"], r["state"], r["place"]) for r in listed["requests"]] == [
        (7, "running", 0),
        (9, "waiting", 1),
    ]
    assert done == {"kind": "ok"}
    assert unknown["message"] == "there is no request 8, or it is over"
    assert node.cancelled == [9]


async def test_load_tells_its_progress(control: Path, node: FakeNode) -> None:
    """Lines while it lasts, one for each change; others are answered meanwhile."""
    reader, writer = await asyncio.open_unix_connection(str(control))
    writer.write(b'{"op":"load","service":"slow"}\n')
    assert json.loads(await reader.readline()) == {
        "kind": "progress",
        "service": "slow",
        "state": "reading",
        "stage": 0.25,
        "device": 0,
    }
    assert (await say(control, b'{"op":"status"}'))[0]["kind"] == "status"
    node.go.set()
    assert json.loads(await reader.readline()) == {"kind": "ok"}
    writer.close()


async def test_load_outlives_its_client(
    control: Path, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presses Ctrl-C stops waiting, not loading."""
    monkeypatch.setattr(control_module, "PROGRESS_SECONDS", 0.001)
    _reader, writer = await asyncio.open_unix_connection(str(control))
    writer.write(b'{"op":"load","service":"slow"}\n')
    await node.begun.wait()
    writer.close()
    assert (await say(control, b'{"op":"status"}'))[0]["kind"] == "status"
    node.go.set()
    await node.done.wait()
    assert node.loaded == [("slow", ())]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not understood"),
        (b"{", "not understood"),
        (b"[]", "not understood"),
        (b'{"op":"explode"}', "not understood"),
        (b'{"op":"load"}', "not understood"),
        (b'{"op":"load","service":5}', "not understood"),
        (b'{"op":"evict","service":"quick","nwo":true}', "not understood"),
        (b"\xff", "not understood"),
        (b"[" * 60000, "not understood"),
        (b'{"op":"load","service":"nobody"}', "there is no service 'nobody'"),
        (b'{"op":"load","service":"odd"}', "the daemon failed on this command"),
    ],
)
async def test_wrong_commands(control: Path, line: bytes, message: str) -> None:
    """One error line each, and the connection goes on."""
    replies = await say(control, line, b'{"op":"status"}')
    error, status = (reply for reply in replies if reply["kind"] != "progress")
    assert error["kind"] == "error"
    assert message in error["message"]
    assert len(error["message"]) <= 200
    assert status["kind"] == "status"


async def test_line_without_end(control: Path) -> None:
    """A client cannot fill the daemon's memory."""
    (reply,) = await say(control, b"x" * (3 * MAX_LINE_BYTES))
    assert reply["kind"] == "error"


async def test_file_mode(control: Path) -> None:
    """Nobody else can connect, and the directory is ours alone."""
    assert mode(control) == 0o600
    assert mode(control.parent) == 0o700


async def test_group(node: FakeNode, tmp_path: Path) -> None:
    """With a group, its members can connect."""
    server = ControlServer(node, tmp_path / "control.sock", group="daemon")
    await server.start()
    assert mode(tmp_path / "control.sock") == 0o660
    await server.close()
    with pytest.raises(ControlError, match="no group"):
        await ControlServer(node, tmp_path / "control.sock", group="no such group").start()


def test_who_may_speak() -> None:
    """The same user and root always; others only through the group."""
    nobody = 65534
    assert may_speak(os.getuid(), 5, None)
    assert may_speak(0, 5, None)
    assert not may_speak(nobody, 5, None)
    assert may_speak(nobody, 5, 5)
    assert not may_speak(nobody, 5, 6)
    assert may_speak(123456, 5, 5)


async def test_strangers_are_turned_away(
    control: Path, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that got past the file's mode still gets one clear error and nothing else."""
    monkeypatch.setattr(control_module, "may_speak", lambda *_: False)
    (reply,) = await say(control, b'{"op":"evict","service":"quick","now":true}')
    assert reply["kind"] == "error"
    assert "permission denied" in reply["message"]
    assert node.evicted == []


async def test_living_socket_is_respected(control: Path, node: FakeNode) -> None:
    """Two daemons on one socket would each own half of the GPUs' truth."""
    with pytest.raises(ControlError, match=f"another seallmd answers on {control}"):
        await ControlServer(node, control).start()
    assert (await say(control, b'{"op":"status"}'))[0]["kind"] == "status"


async def test_stale_socket_is_replaced(node: FakeNode, tmp_path: Path) -> None:
    """A daemon that was killed leaves its socket; a file that is no socket is somebody's."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(node, path)
    await server.start()
    assert (await say(path, b'{"op":"status"}'))[0]["kind"] == "status"
    await server.close()
    path.write_text("precious")
    with pytest.raises(ControlError, match="not a socket"):
        await ControlServer(node, path).start()
    assert path.read_text() == "precious"


def test_default_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root's socket is the system's; others have it in their runtime directory, or in /tmp."""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert paths.default_control_socket() == Path("/run/seallmd/control.sock")
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert paths.default_control_socket() == tmp_path / "seallmd" / "control.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert paths.default_control_socket() == Path("/tmp/seallmd-1234/control.sock")
    monkeypatch.setattr(paths, "SYSTEM_CONTROL_SOCKET", tmp_path)
    assert paths.find_control_socket() == tmp_path


def test_foreign_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In /tmp anyone can make our directory first, and would then hold our socket."""
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    os.chown(tmp_path, 4321, -1) if os.geteuid() == 0 else None
    with pytest.raises(ControlError, match="another user"):
        paths.make_socket_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ControlError):
        paths.make_socket_directory(tmp_path / "file")

"""The real daemon as systemd meets it, without systemd: what it tells, takes over, reads again, survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from tests.e2e.daemon import SMOL, Daemon, service

# Nothing can be loaded, so it is up as soon as its processes are.
IDLE = '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "64 MiB"\n' + service("broken", "no-such-model")

# Starts the daemon as systemd does: its own pid in LISTEN_PID, the sockets from descriptor 3 on.
ACTIVATE = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "seallmd", *sys.argv[1:]])
"""


class Manager:
    """What systemd is to the daemon: a datagram socket that is told things.

    It reads as they come, in a thread: a socket that nobody reads holds a few datagrams only.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self.told: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while text := self._socket.recv(4096).decode():
            with self._more:
                self.told += text.split("\n")
                self._more.notify_all()

    def has(self, beginning: str) -> bool:
        """Whether something that begins like this was told since the last `forget`."""
        return any(line.startswith(beginning) for line in list(self.told))

    def hears(self, beginning: str) -> bool:
        """The same, of what is still on its way too."""
        with self._more:
            return self._more.wait_for(lambda: self.has(beginning), timeout=30)

    def forget(self) -> None:
        """Drop what was told so far."""
        self.told.clear()

    def close(self) -> None:
        """Listen no more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Daemons that are started now tell this one, over an abstract socket, and are watched."""
    name = f"seallmd-test-{os.getpid()}"
    found = Manager("\0" + name)
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
    monkeypatch.setenv("WATCHDOG_USEC", "500000")
    yield found
    found.close()


def log_lines(daemon: Daemon, message: str) -> list[dict[str, object]]:
    """Records of a JSON log; the children's own lines are not JSON."""
    lines = [line for line in daemon.log.read_text().splitlines() if line.startswith("{")]
    return [record for record in map(json.loads, lines) if str(record["message"]).startswith(message)]


def test_a_life_under_systemd(tmp_path: Path, manager: Manager) -> None:
    """Ready, alive, report, reload for good and for bad, a hung worker, a drain: what is told and logged.

    One daemon for all, because its start is what takes time.
    """
    config = '[log]\nformat = "json"\n'
    config += '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "800 MiB"\n'
    config += service(SMOL, SMOL, preload=True)
    daemon = Daemon(tmp_path, config)
    try:
        daemon.until(lambda: manager.has("READY=1"), "READY=1")
        assert httpx.get(f"{daemon.url}/version").status_code == 200, "ready, but it does not accept"
        daemon.until(lambda: manager.has("STATUS=1 of 1 services resident, 0 requests"), "the status line")
        check_request_line(daemon)
        check_reload(daemon, manager, config)
        check_hung_worker(daemon, manager, config)
        check_drain(daemon, manager)
    finally:
        daemon.kill()


def check_request_line(daemon: Daemon) -> None:
    """One line per request with its figures; never its text."""
    daemon.client().completions.create(
        model=SMOL, prompt="A secret word:", max_tokens=5, extra_body={"ignore_eos": True}
    )
    (line,) = log_lines(daemon, "request")
    assert (line["service"], line["outcome"], line["output"]) == (SMOL, "length", 5)
    assert 0 < float(str(line["first_seconds"])) <= float(str(line["seconds"]))
    assert "secret" not in daemon.log.read_text()
    daemon.process.send_signal(signal.SIGUSR1)
    (report,) = daemon.until(lambda: log_lines(daemon, "status of a service"), "the report", 10)
    assert (report["name"], report["state"], report["output_tokens"]) == (SMOL, "resident", 5)


def check_reload(daemon: Daemon, manager: Manager, config: str) -> None:
    """A good file changes what can be changed and names the rest; a bad one changes nothing."""
    file = daemon.directory / "seallmd.toml"
    manager.forget()
    file.write_text("stop_seconds = 11\n" + config.replace("800 MiB", "900 MiB"))
    daemon.process.send_signal(signal.SIGHUP)
    (read,) = daemon.until(lambda: log_lines(daemon, "configuration read again"), "the reload")
    assert str(read["message"]).endswith("changed: stop_seconds")
    (restart,) = daemon.until(lambda: log_lines(daemon, "these changes need a restart"), "the rest", 10)
    assert str(restart["message"]).endswith(": devices.memory")
    daemon.until(lambda: manager.has("RELOADING=1") and manager.has("READY=1"), "told of the reload", 10)
    assert manager.hears("MONOTONIC_USEC=")
    file.write_text("stop_seconds = -1\n" + config)
    daemon.process.send_signal(signal.SIGHUP)
    (refused,) = daemon.until(lambda: log_lines(daemon, "the configuration stays"), "the refusal", 10)
    assert ":1: " in str(refused["message"])
    assert daemon.client().completions.create(model=SMOL, prompt="Hi", max_tokens=1).choices


def check_hung_worker(daemon: Daemon, manager: Manager, config: str) -> None:
    """A worker that is stopped is killed and started again; its stream goes on where it was."""
    victim = daemon.status()["devices"][0]["pid"]
    stream = daemon.client().completions.create(
        model=SMOL, prompt="Go on:", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    manager.forget()
    set_hung_seconds(daemon, config, 1)  # for now: on a busy machine a load may well be silent for longer
    os.kill(victim, signal.SIGSTOP)
    daemon.until(lambda: not psutil.pid_exists(victim), "the end of the hung worker", 30)
    set_hung_seconds(daemon, config, 100)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert log_lines(daemon, "cpu0: hung: owes an answer (step)")
    daemon.until(lambda: daemon.service(SMOL)["state"] == "resident", "the model came back")
    assert daemon.client().completions.create(model=SMOL, prompt="Hi", max_tokens=3).choices[0].text
    assert manager.hears("WATCHDOG=1"), "systemd would have killed the daemon for its worker"


def set_hung_seconds(daemon: Daemon, config: str, seconds: int) -> None:
    """While it runs."""
    reloads = len(log_lines(daemon, "configuration read again"))
    (daemon.directory / "seallmd.toml").write_text(f"hung_seconds = {seconds}\n{config}")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until(lambda: len(log_lines(daemon, "configuration read again")) > reloads, "the reload")


def check_drain(daemon: Daemon, manager: Manager) -> None:
    """While a request ends, systemd is asked for time; the request ends well."""
    with daemon.client().completions.create(
        model=SMOL, prompt="Go on:", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        chunks = iter(stream)
        next(chunks)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.until(lambda: manager.has("STOPPING=1"), "STOPPING=1")
        assert manager.hears("EXTEND_TIMEOUT_USEC=")
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert daemon.process.wait(timeout=30) == 0


def test_sockets_are_taken_over(tmp_path: Path) -> None:
    """HTTP and control come from whoever started the daemon, and are still there when it is gone.

    Requests between two daemons wait in the backlog, so that a restart refuses nobody.
    """
    paths = {name: tmp_path / f"{name}.sock" for name in ("http", "control")}
    listeners = []
    for path in paths.values():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)
    (tmp_path / "seallmd.toml").write_text(IDLE)
    log = tmp_path / "log"
    environment = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:control"}
    with (
        log.open("wb") as file,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(paths["http"]))) as client,
    ):
        process = _spawn(tmp_path, environment, [listener.fileno() for listener in listeners], file.fileno())
        try:
            # Asked before anybody listens: answered once the daemon is there.
            models = client.get("http://seallmd/v1/models", timeout=60).json()
            assert [model["id"] for model in models["data"]] == ["broken"], log.read_text()
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(paths["control"]))
                control.sendall(b'{"op": "status"}\n')
                assert b'"kind":"status"' in control.makefile("rb").readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()
            assert all(path.exists() for path in paths.values()), "a socket that is not ours was removed"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for listener in listeners:
                listener.close()


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd is not installed, nor could `make test` install it",
)
def test_systemd_hands_over_its_sockets(tmp_path: Path, manager: Manager) -> None:
    """By systemd's own tool, which listens and starts the daemon when somebody calls: nobody is refused."""
    paths = [tmp_path / "http.sock", tmp_path / "control.sock"]
    (tmp_path / "seallmd.toml").write_text(IDLE)
    given = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "PYTHONPATH")
    command = ["systemd-socket-activate", *(f"--listen={path}" for path in paths), "--fdname=http:control"]
    command += [f"--setenv={name}={os.environ[name]}" for name in given if name in os.environ]
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(paths[0])), timeout=60) as client,
    ):
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "seallmd", "--config", "seallmd.toml"],
            cwd=tmp_path,
            stdout=file,
            stderr=file,
        )
        try:
            end = time.monotonic() + 60
            while not paths[1].exists() and time.monotonic() < end:
                time.sleep(0.02)
            assert not manager.told, "it was started before anybody called"
            models = client.get("http://seallmd/v1/models").json()
            assert [model["id"] for model in models["data"]] == ["broken"], log.read_text()
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(paths[1]))
                control.sendall(b'{"op": "status"}\n')
                assert b'"kind":"status"' in control.makefile("rb").readline()
            assert manager.hears("READY=1")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()
            assert manager.hears("STOPPING=1")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _spawn(
    directory: Path, environment: dict[str, str], descriptors: list[int], log: int
) -> subprocess.Popen[bytes]:
    """Start the daemon with these descriptors as 3, 4, ..., by way of a process that moves them there."""
    moves = "import os\n" + "".join(
        f"os.dup2({descriptor}, {100 + index})\n" for index, descriptor in enumerate(descriptors)
    )
    moves += "".join(
        f"os.dup2({100 + index}, {3 + index}, inheritable=True)\n" for index in range(len(descriptors))
    )
    return subprocess.Popen(
        [sys.executable, "-c", moves + ACTIVATE, "--config", "seallmd.toml"],
        cwd=directory,
        env=environment,
        pass_fds=descriptors,
        stdout=log,
        stderr=log,
    )


def test_kill_9_of_the_daemon_leaves_nothing_behind(tmp_path: Path) -> None:
    """Workers and the host process end with it, even one that is stopped; the next daemon starts."""
    daemon = Daemon(tmp_path, IDLE)
    try:
        daemon.wait_healthy()
        names = {"seallmd-cpu0", "seallmd-host", "seallmd-forks"}
        daemon.until(lambda: set(_named(daemon)) == names, "the start of all children")
        family = daemon.children()
        scores = {name: _oom_score(child.pid) for name, child in _named(daemon).items()}
        assert set(scores.values()) == {500}, f"out of memory, the daemon would go first: {scores}"
        _named(daemon)["seallmd-cpu0"].suspend()
        daemon.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"left behind: {alive}"
    finally:
        daemon.kill()
    again = Daemon(tmp_path, IDLE)
    try:
        again.wait_healthy()  # over the dead one's control socket
        assert again.stop() == 0
    finally:
        again.kill()


def _named(daemon: Daemon) -> dict[str, psutil.Process]:
    """The children that have said who they are, by name."""
    return {child.name(): child for child in daemon.children() if child.name().startswith("seallmd-")}


def _oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

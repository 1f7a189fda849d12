"""A real daemon for tests: started from a configuration, watched, stopped, and checked for what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from openai import AsyncOpenAI, OpenAI

MODELS = Path(__file__).parents[2] / "models"
SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
START_SECONDS = 120.0


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def service(name: str, model: str, **more: object) -> str:
    """One [[service]] table."""
    fields = {"name": name, "model": str(MODELS / model), **more}
    return "[[service]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())


class Daemon:
    """One `seallmd` process. `log` holds what it wrote; it and the journal may be elsewhere than usual."""

    def __init__(
        self, directory: Path, config: str, *, log: Path | None = None, journal: Path | None = None
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.control = directory / "control.sock"
        self.log = log or directory / "log"
        self.journal = journal or directory / "run.journal"
        (directory / "seallmd.toml").write_text(config)
        self._file = self.log.open("wb")
        self._clients: list[OpenAI] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "seallmd"),
                *("--config", directory / "seallmd.toml", "--port", str(self.port)),
                *("--control", self.control, "--journal", self.journal),
            ],
            stdout=self._file,
            stderr=self._file,
            cwd=directory,
            env={**os.environ, "XDG_STATE_HOME": str(directory / "state")},
        )

    @property
    def url(self) -> str:
        """Where HTTP is."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> OpenAI:
        """The official client, without retries, so that failures are seen."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300, **more)
        self._clients.append(client)
        return client

    def async_client(self) -> AsyncOpenAI:
        """The same for asyncio."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def until(self, condition: Any, what: str, seconds: float = START_SECONDS) -> Any:
        """Wait until `condition()` is true; fails with the log when it never is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the daemon died\n{self.log.read_text()}"
            if result := condition():
                return result
            time.sleep(0.05)
        raise AssertionError(f"{what} did not happen within {seconds} s\n{self.log.read_text()}")

    def wait_healthy(self) -> None:
        """Until every device is up."""
        self.until(lambda: self._health() == 200, "health")

    def _health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health").status_code
        except httpx.TransportError:
            return 0

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run seallmctl."""
        return subprocess.run(
            [sys.executable, "-m", "seallmd.ctl.main", "--socket", str(self.control), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def events(self) -> Iterator[dict[str, Any]]:
        """What has happened and happens from now on, without end."""
        command = [sys.executable, "-m", "seallmd.ctl.main", "--socket", str(self.control), "events"]
        options = ["--follow", "--last", "1000", "--json"]
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield from map(json.loads, process.stdout)
            finally:
                process.terminate()

    def status(self) -> dict[str, Any]:
        """`seallmctl status --json`."""
        result = self.ctl("status", "--json")
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    def service(self, name: str) -> dict[str, Any]:
        """One service's status."""
        return next(s for s in self.status()["services"] if s["name"] == name)

    def children(self) -> list[psutil.Process]:
        """Every process below the daemon."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """SIGTERM; returns the exit code. Fails when anything is left behind."""
        family = self.children()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"left behind: {alive}"
        assert not self.control.exists(), "the control socket is still there"
        return code

    def kill(self) -> None:
        """Make sure that nothing runs on, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._file.close()
        for client in self._clients:
            client.close()

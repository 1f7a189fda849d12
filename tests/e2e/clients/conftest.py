"""Running other people's clients: programs in environments of their own (`make clients`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.daemon import GEMMA, SMOL, Daemon

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
ENVIRONMENTS = Path(os.environ.get("SEALLMD_CLIENTS", HERE.parents[2] / ".clients"))
OURS = "ours"
SECONDS = 400

Run = Callable[..., str]


def program(environment: str, name: str) -> Path:
    """An executable of an environment. One that is not there is a failure: nothing is skipped in silence."""
    if environment == OURS:
        return Path(sys.executable).parent / name
    found = ENVIRONMENTS / environment / "bin" / name
    assert found.exists(), f"{found} is not there: run `make clients`"
    return found


def run(command: list[str | Path], cwd: Path = SCRIPTS, **environment: str) -> str:
    """What a program writes to stdout, run where it may write; fails with all that it wrote when it fails."""
    # Of the shell's own settings none is to reach a client: a key, a proxy, a path to our packages.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def client(daemon: Daemon) -> Run:
    """Runs a script of `scripts` in an environment; returns the last line that it prints."""

    def ask(environment: str, script: str) -> str:
        command = [program(environment, "python"), SCRIPTS / script, daemon.url, SMOL, GEMMA]
        return run(command).splitlines()[-1]

    return ask

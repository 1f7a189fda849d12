"""Servers of several language models to be measured side by side: seallmd, and what people use instead.

Owns their processes and configurations: `offered` starts one system on free local ports, and leaves nothing
behind. Must not measure.

A system is written as a kind and words of its own:

    seallmd POLICY             one daemon; policies are those of `[policy] scheduler`
    llama-server [ARGUMENTS]   llama.cpp's server, one process for each service
    router [ARGUMENTS]         one llama-server in router mode, which starts such processes on demand
    llama-cpp-python           its server, which holds one model and loads another when that is asked for
"""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from seallmd.core.scheduler import POLICIES
from seallmd.sim.models import SimError
from seallmd.worker.process import bind_to_parent
from tools.demo import Daemon
from tools.replay_client import Service

HOST = "127.0.0.1"
KINDS = ("seallmd", "llama-server", "router", "llama-cpp-python")

_START_SECONDS = 240.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.2
_LOG_CHARACTERS = 2000


class Hosted(NamedTuple):
    """A service that every system is to offer: the same weights as a directory and as a GGUF file."""

    name: str
    checkpoint: Path
    gguf: Path


@dataclass(frozen=True)
class Machine:
    """How systems are run. llama_server, llama_python: a program, and a Python that has llama_cpp; None when
    not installed. dtype, workers, memory, cache: seallmd's own settings. context: tokens of one request.
    journal: where seallmd writes one, if anywhere.
    """

    llama_server: Path | None
    llama_python: Path | None
    dtype: str
    workers: int
    memory: str
    context: int
    cache: Path
    journal: Path | None = None


class NotInstalledError(SimError):
    """A system is not on this machine."""


@contextlib.contextmanager
def offered(system: str, hosted: Sequence[Hosted], machine: Machine) -> Iterator[list[Service]]:
    """A running system's services, ready for requests. Raises SimError when it cannot be had."""
    kind, *words = shlex.split(system)
    start = {
        "seallmd": _seallmd,
        "llama-server": _llama_servers,
        "router": _router,
        "llama-cpp-python": _llama_cpp_python,
    }.get(kind)
    if start is None:
        raise SimError(f"no system is called {kind!r}; there are {', '.join(KINDS)}")
    with (
        tempfile.TemporaryDirectory(prefix="seallmd-bench-") as folder,
        start(words, hosted, machine, Path(folder)) as services,
    ):
        yield services


# ------------------------------------------------------------------------------------------ seallmd


@contextlib.contextmanager
def _seallmd(
    words: Sequence[str], hosted: Sequence[Hosted], machine: Machine, folder: Path
) -> Iterator[list[Service]]:
    if len(words) != 1 or words[0] not in POLICIES:
        raise SimError(f"seallmd is followed by one of {', '.join(POLICIES)}")
    path = folder / "seallmd.toml"
    path.write_text(configuration(words[0], hosted, machine))
    daemon = Daemon(path, folder)
    try:
        _wait_for_daemon(daemon)
        yield [Service(one.name, daemon.base_url, one.name) for one in hosted]
        daemon.stop()  # what it has learnt of the services is written then
    finally:
        daemon.end()


def configuration(policy: str, hosted: Sequence[Hosted], machine: Machine) -> str:
    """A seallmd.toml. (TOML's basic strings are written like JSON's.)"""
    tables: list[tuple[str, Mapping[str, object]]] = [
        (
            "[devices]",
            {
                "kind": "cpu",
                "cpu_workers": machine.workers,
                "memory": machine.memory,
                "cache": str(machine.cache),
            },
        ),
        ("[policy]", {"scheduler": policy}),
    ]
    if machine.journal is not None:
        tables.append(("[journal]", {"path": str(machine.journal.absolute())}))
    for one in hosted:
        model = str(one.checkpoint.absolute())
        settings = {"name": one.name, "model": model, "dtype": machine.dtype, "context": machine.context}
        tables.append(("[[service]]", settings))
    return "\n".join(
        "\n".join([head, *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""])
        for head, table in tables
    )


def _wait_for_daemon(daemon: Daemon) -> None:
    """Until every service is examined. None is preloaded: the first requests bring them in."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        daemon.check()
        report = daemon.status()
        if report is not None and daemon.is_healthy():
            services = report["services"]
            if refused := [s for s in services if s["reason"]]:
                raise SimError(f"{refused[0]['name']} cannot be served: {refused[0]['reason']}")
            if all(s["state"] in ("absent", "resident") for s in services):
                return
        time.sleep(_POLL_SECONDS)
    raise SimError(f"seallmd is not ready after {_START_SECONDS:.0f} s: {daemon.end_of_log()}")


# ------------------------------------------------------------------------------------------ rivals


@contextlib.contextmanager
def _llama_servers(
    words: Sequence[str], hosted: Sequence[Hosted], machine: Machine, folder: Path
) -> Iterator[list[Service]]:
    program = _program(machine.llama_server, "llama-server")
    with contextlib.ExitStack() as stack:
        services = []
        for one in hosted:
            port = _free_port()
            command = [program, "--model", str(one.gguf), *_address(port), *words]
            stack.enter_context(_process(command, folder / f"{one.name}.log", f"http://{HOST}:{port}/health"))
            services.append(Service(one.name, f"http://{HOST}:{port}/v1", one.name))
        yield services


@contextlib.contextmanager
def _router(
    words: Sequence[str], hosted: Sequence[Hosted], machine: Machine, folder: Path
) -> Iterator[list[Service]]:
    program, port, presets = (
        _program(machine.llama_server, "llama-server"),
        _free_port(),
        folder / "presets.ini",
    )
    lines = [f"[{one.name}]\nmodel = {one.gguf.absolute()}\n" for one in hosted]
    presets.write_text("version = 1\n\n" + "\n".join(lines))
    command = [program, "--models-preset", str(presets), *_address(port), *words]
    with _process(command, folder / "router.log", f"http://{HOST}:{port}/health"):
        yield [Service(one.name, f"http://{HOST}:{port}/v1", one.name) for one in hosted]


@contextlib.contextmanager
def _llama_cpp_python(
    _words: Sequence[str], hosted: Sequence[Hosted], machine: Machine, folder: Path
) -> Iterator[list[Service]]:
    program, port = _program(machine.llama_python, "llama-cpp-python"), _free_port()
    path = folder / "models.json"
    # By default a new request cuts off the answer at hand, and each prompt token gets logits: neither would
    # do it justice.
    models = [
        {"model": str(one.gguf), "model_alias": one.name, "n_ctx": machine.context, "logits_all": False}
        for one in hosted
    ]
    settings = {"host": HOST, "port": port, "interrupt_requests": False, "models": models}
    path.write_text(json.dumps(settings))
    command = [program, "-m", "llama_cpp.server", "--config_file", str(path)]
    with _process(command, folder / "server.log", f"http://{HOST}:{port}/v1/models"):
        yield [Service(one.name, f"http://{HOST}:{port}/v1", one.name) for one in hosted]


def _program(path: Path | None, name: str) -> str:
    if path is None or not path.exists():
        raise NotInstalledError(f"{name} is not installed")
    return str(path)


def _address(port: int) -> list[str]:
    return ["--host", HOST, "--port", str(port)]


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, ready_url: str) -> Iterator[None]:
    """A server that answers at `ready_url`, until the block ends. Raises SimError if it does not come up."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=bind_to_parent,
        )
    try:
        end = time.monotonic() + _START_SECONDS
        while not _answers(ready_url):
            if process.poll() is not None or time.monotonic() > end:
                raise SimError(
                    f"{Path(command[0]).name} does not start: {log.read_text()[-_LOG_CHARACTERS:]}"
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

"""Measuring several servers: what is started, what is kept, what is shown."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from seallmd import config
from seallmd.sim.metrics import Seen
from seallmd.sim.models import SimError
from tests.tools.test_replay_trace import FakeServer
from tools import bench_absent, bench_rivals, rivals
from tools.replay_client import Line, Service
from tools.rivals import Hosted, Machine, offered


def machine(folder: Path, program: Path | None = None) -> Machine:
    """A machine on which at most one program is installed."""
    return Machine(
        llama_server=program,
        llama_python=None,
        dtype="bfloat16",
        workers=2,
        memory="1 GiB",
        context=512,
        cache=folder,
    )


def command(folder: Path, *more: str) -> list[str]:
    """Arguments that both tools need."""
    service = ["--service", "chat", "m", "m.gguf", "--service", "code", "m", "m.gguf"]
    return [*service, "--cache", str(folder), *more]


def test_the_configuration_of_the_daemon(tmp_path: Path) -> None:
    """Protects what is measured: policy, devices and services are those that were asked for."""
    hosted = [Hosted(name, tmp_path / 'a "model"', tmp_path / "x.gguf") for name in ("chat", "code")]
    path = tmp_path / "seallmd.toml"
    path.write_text(rivals.configuration("fcfs", hosted, machine(tmp_path)))
    read = config.load(path)
    assert (read.policy.scheduler, read.devices.cpu_workers, read.devices.memory) == ("fcfs", 2, "1 GiB")
    assert [s.name for s in read.service] == ["chat", "code"]
    assert {(s.model, s.dtype, s.context) for s in read.service} == {
        (str(tmp_path / 'a "model"'), "bfloat16", 512)
    }


@pytest.mark.parametrize("system", ["ollama", "seallmd", "seallmd fifo"])
def test_systems_nobody_knows(tmp_path: Path, system: str) -> None:
    """Protects against runs of something else than what was asked for."""
    with pytest.raises(SimError), offered(system, [], machine(tmp_path)):
        raise AssertionError("it was started")


SERVER = """#!{python}
import http.server, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pathlib.Path({folder!r}, "args-" + pathlib.Path(words["--model"]).stem).write_text(" ".join(sys.argv[1:]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


def script(folder: Path, text: str) -> Path:
    """A program."""
    path = folder / "llama-server"
    path.write_text(text.format(python=sys.executable, folder=str(folder)))
    path.chmod(0o755)
    return path


def test_one_server_for_each_service(tmp_path: Path) -> None:
    """Protects the rival: each model in a process and on a port of its own, and none stays behind."""
    program = script(tmp_path, SERVER)
    hosted = [Hosted(name, tmp_path, tmp_path / f"{name}.gguf") for name in ("chat", "code")]
    with offered("llama-server -t 1", hosted, machine(tmp_path, program)) as services:
        urls = [service.url for service in services]
        assert len(set(urls)) == 2
        assert all(rivals._answers(url) for url in urls)
    assert not any(rivals._answers(url) for url in urls)
    for one in hosted:
        assert (tmp_path / f"args-{one.name}").read_text().endswith("-t 1")


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    """Protects people from waiting: what it said last is in the error."""
    program = script(tmp_path, "#!{python}\nraise SystemExit('no such model')\n")
    hosted = [Hosted("chat", tmp_path, tmp_path / "x.gguf")]
    with (
        pytest.raises(SimError, match="no such model"),
        offered("router", hosted, machine(tmp_path, program)),
    ):
        raise AssertionError("it was started")


def test_what_is_not_installed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects machines without rivals: no failure, and no figures."""
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,prompt_tokens,output_tokens\n0,5,2\n1,5,2\n")
    systems = ["--system", "llama-server", "--system", "llama-cpp-python"]
    words = command(tmp_path, *systems, "--trace", str(trace), "--out", str(tmp_path / "out"))
    assert bench_rivals.main(words) == 0
    assert bench_absent.main(command(tmp_path, "--system", "router")) == 0
    assert capsys.readouterr().err.count("is not installed") == 3
    assert not list((tmp_path / "out").iterdir())


async def served(monkeypatch: pytest.MonkeyPatch, words: list[str], main: object) -> tuple[int, FakeServer]:
    """A tool's command with a small server as every system: its exit code, and the server."""
    fake = FakeServer()
    application = web.Application()
    application.router.add_post("/v1/completions", fake.complete)
    async with TestServer(application) as running:

        @contextlib.contextmanager
        def one(_system: str, hosted: Sequence[Hosted], _machine: Machine) -> Iterator[list[Service]]:
            yield [Service(h.name, str(running.make_url("/v1")), h.name) for h in hosted]

        monkeypatch.setattr(bench_rivals, "offered", one)
        monkeypatch.setattr(bench_absent, "offered", one)
        code = await asyncio.to_thread(main, words)  # type: ignore[arg-type]
    return code, fake


async def test_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects long measurements: a run that is there is shown but not repeated, and T_iso stays the same."""
    trace, out = tmp_path / "trace.csv", tmp_path / "out"
    trace.write_text("seconds,prompt_tokens,output_tokens\n" + "".join(f"{n},40,8\n" for n in range(20)))
    words = command(tmp_path, "--trace", str(trace), "--lengths", "0.5", "--out", str(out))
    words += ["--rate", "50", "--seconds", "0.2", "--warm-up", "2"]
    code, fake = await served(monkeypatch, [*words, "--system", "llama-server"], bench_rivals.main)
    assert code == 0
    assert [body["max_tokens"] for body in fake.bodies[-10:]] == [4] * 10
    first = msgspec.json.decode((out / "llama-server-50.json").read_bytes())
    both = ["--system", "llama-server", "--system", "llama-server -t 1"]
    code, _ = await served(monkeypatch, [*words, *both], bench_rivals.main)
    assert code == 0
    second = msgspec.json.decode((out / "llama-server-t-1-50.json").read_bytes())
    assert second["isolated"] == first["isolated"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("| llama-server -t 1 |")


async def test_absent_models_are_asked_for_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the figures: each model is asked for twice, after the other one; then both side by side."""
    report = tmp_path / "first.json"
    words = command(tmp_path, "--system", "router", "--turns", "3", "--pause", "0", "--json", str(report))
    words += ["--seconds", "0.01"]
    code, fake = await served(monkeypatch, words, bench_absent.main)
    assert code == 0
    (found,) = msgspec.json.decode(report.read_bytes())
    beside = {name: len(times) for name, times in found["beside"].items()}
    assert all(beside.values())
    bodies = fake.bodies[-12 - sum(beside.values()) :]
    assert [body["model"] for body in bodies[:12]] == ["chat", "chat", "code", "code"] * 3
    assert Counter(body["model"] for body in bodies[12:]) == beside
    assert {body["max_tokens"] for body in bodies[12:]} == {16}
    assert len(found["absent"]["chat"]) == len(found["present"]["code"]) == 3
    out = capsys.readouterr().out
    assert "| router | chat | 3 |" in out
    assert f"| router | code | {beside['code']} |" in out


def test_the_table_by_hand() -> None:
    """Protects the arithmetic; a request that failed is served by nobody, and within no target."""
    requests = [
        Seen("chat", 0.0, 10, 10, 2.0, 0.5),
        Seen("chat", 1.0, 10, 20, 20.0, 1.5),
        Seen("chat", 2.0, 10, 10, None, None),
    ]
    reports = [bench_rivals._Named("it", 0.5)]
    *_, row = bench_rivals.table_of([bench_rivals.Run(reports, {"chat": Line(0.0, 0.0, 0.1)}, requests)])
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["it", "0.50", "2/3", "30"]
    assert cells[4:] == ["600", "200", "1000", "6.0", "2.0", "10.0", "1.00", "0.50", "1.50", "33%"]

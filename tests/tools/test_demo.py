"""Tests of tools/demo.py: its arithmetic, one stream against a stand-in, and real short runs."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest

from tools.demo_streams import Stream, mean, percentile

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"


# ------------------------------------------------------------------------------------------- streams


def test_percentiles_are_of_the_nearest_rank() -> None:
    """Protects the figures that the demo prints."""
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.95) == 95
    assert percentile([7.0], 0.95) == 7
    assert mean([1.0, 2.0]) == 1.5
    assert math.isnan(percentile([], 0.95))
    assert math.isnan(mean([]))


class Client:
    """Stands in for openai.AsyncOpenAI: answers with these pieces, or raises."""

    def __init__(self, pieces: list[str], error: Exception | None = None) -> None:
        self.completions = self
        self.chat = SimpleNamespace(completions=self)
        self._pieces = pieces
        self._error = error

    async def create(self, **request: Any) -> AsyncIterator[SimpleNamespace]:
        """As the client's method of the same name."""
        if self._error is not None:
            raise self._error
        return self._chunks("messages" in request)

    async def _chunks(self, chat: bool) -> AsyncIterator[SimpleNamespace]:
        for piece in self._pieces:
            choice = (
                SimpleNamespace(delta=SimpleNamespace(content=piece)) if chat else SimpleNamespace(text=piece)
            )
            yield SimpleNamespace(choices=[choice], usage=None)
        yield SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=len(self._pieces)))


def _refusal(message: str) -> openai.BadRequestError:
    response = httpx.Response(400, request=httpx.Request("POST", "http://nobody"))
    return openai.BadRequestError(message, response=response, body=None)


@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_is_measured(chat: bool) -> None:
    """Protects the counts: one first piece an answer, gaps between the others, empty pieces are none."""
    stream = Stream("a", "prompt", 3, chat=chat)
    for _ in range(2):
        await stream.run(Client(["one ", "", "two ", "three"]))
    assert (stream.text, stream.answers, stream.tokens) == ("one two three", 2, 8)
    assert (len(stream.first), len(stream.gaps), stream.error) == (2, 4, "")


async def test_a_failed_stream_keeps_its_reason() -> None:
    """Protects the exit code: a failure that is swallowed would pass for a success."""
    stream = Stream("a", "prompt", 3, chat=True)
    await stream.run(Client([], _refusal("too long")))
    assert "too long" in stream.error
    assert not stream.unserved


async def test_a_model_that_cannot_chat_is_no_failure() -> None:
    """Protects the demo of base models, which have no chat template."""
    stream = Stream("a", "prompt", 3, chat=True)
    await stream.run(Client([], _refusal("this model has no chat template; use /v1/completions")))
    assert stream.unserved
    assert stream.error == ""


# ---------------------------------------------------------------------------------------- real runs


def _configuration(folder: Path, *models: Path) -> Path:
    """One CPU device with room for two of the small model."""
    text = '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "1152 MiB"\n'
    for number, model in enumerate(models):
        text += f'[[service]]\nname = "m{number}"\nmodel = {json.dumps(str(model))}\ncontext = 512\n'
    file = folder / "seallmd.toml"
    file.write_text(text)
    return file


def _command(configuration: Path) -> list[str]:
    return [sys.executable, "-m", "tools.demo", "--quick", "--config", str(configuration)]


def _demo(configuration: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(configuration), cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_wrong_configuration_is_told(tmp_path: Path) -> None:
    """Protects the exit code and the reason when there is nothing to start."""
    done = _demo(_configuration(tmp_path))
    assert done.returncode == 1
    assert "nothing to serve" in done.stdout


@pytest.mark.real
def test_the_demo_runs_through(tmp_path: Path) -> None:
    """Protects `make demo`: streams of all services, a swap under way, a clean stop."""
    done = _demo(_configuration(tmp_path, MODEL, MODEL))
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("m0 · text:", "m1 · chat:", "seallmctl evict", "seallmctl load", "no process was left"):
        assert expected in done.stdout


@pytest.mark.real
def test_a_service_that_cannot_be_served_fails_the_demo(tmp_path: Path) -> None:
    """Protects from a demo that is pleased with less than what is configured."""
    (tmp_path / "empty").mkdir()
    done = _demo(_configuration(tmp_path, tmp_path / "empty"))
    assert done.returncode == 1
    assert "m0 cannot be served" in done.stdout
    assert "The end of the daemon's log" in done.stdout


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A demo that has just started its daemon, and that daemon."""
    command = _command(_configuration(tmp_path, MODEL))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert "seallmd on http" in demo.stdout.readline()
        yield demo, psutil.Process(demo.pid).children()[0]
        demo.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_daemon_never_stays_behind(
    started: tuple[subprocess.Popen[str], psutil.Process], number: signal.Signals, code: int
) -> None:
    """Protects the machine's memory: however the demo ends, its daemon does too."""
    demo, daemon = started
    demo.send_signal(number)
    assert demo.wait(60) == code
    assert psutil.wait_procs([daemon], timeout=30)[1] == []

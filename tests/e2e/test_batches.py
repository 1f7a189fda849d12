"""Batches through the real daemon and the official client: answers, interactive requests beside, kill -9."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from tests.e2e.daemon import SMOL, Daemon, service

pytestmark = pytest.mark.real

LINES = 16
CONFIG = '[devices]\nkind = "cpu"\ncpu_workers = 1\nmemory = "1 GiB"\n[batches]\nin_flight = 4\n' + service(
    SMOL, SMOL, dtype="float32", preload=True
)


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    """The daemons of a test, one after the other on one directory; the last one is stopped."""
    started: list[Daemon] = []
    try:
        yield started
        assert started[-1].stop() == 0, started[-1].log.read_text()
    finally:
        for daemon in started:
            daemon.kill()


def start(started: list[Daemon], directory: Path) -> Daemon:
    """One more daemon."""
    daemon = Daemon(directory, CONFIG)
    started.append(daemon)
    daemon.wait_healthy()
    return daemon


def body(number: int, tokens: int) -> dict[str, Any]:
    """The request of a line."""
    message = {"role": "user", "content": f"Count up from {number}."}
    return {"model": SMOL, "messages": [message], "max_tokens": tokens, "temperature": 0}


def begin(client: OpenAI, tokens: int) -> Batch:
    """Upload an input and begin its batch."""
    lines = [
        {"custom_id": f"n{n}", "method": "POST", "url": "/v1/chat/completions", "body": body(n, tokens)}
        for n in range(LINES)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )


def wait(daemon: Daemon, batch: Batch, status: str) -> None:
    """Until an event tells that the batch is so."""
    for event in daemon.events():
        if event["text"].startswith(f"{batch.id} is "):
            told = event["text"].split()[2].rstrip(":")
            assert told not in {"failed", "expired", "cancelled"} - {status}, event["text"]
            if told == status:
                return


def answers(client: OpenAI, batch: Batch) -> dict[str, str]:
    """The text of each line, in the order of the file."""
    batch = client.batches.retrieve(batch.id)
    assert batch.error_file_id is None
    lines = [json.loads(line) for line in client.files.content(str(batch.output_file_id)).text.splitlines()]
    assert len(lines) == len({line["custom_id"] for line in lines}) == LINES
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


def test_a_batch_beside_interactive_requests(daemons: list[Daemon], tmp_path: Path) -> None:
    """Protects: lines say what the endpoint says, and whoever waits in person is served beside them."""
    daemon = start(daemons, tmp_path)
    client = daemon.client()
    batch = begin(client, tokens=24)
    wait(daemon, batch, "in_progress")
    shown = json.loads(daemon.ctl("batches", "--json").stdout)
    assert [(each["id"], each["lines"]) for each in shown] == [(batch.id, LINES)]
    waiting = json.loads(daemon.ctl("requests", "--json").stdout)
    assert {request["tier"] for request in waiting} <= {"batch"}
    direct = {n: client.chat.completions.create(**body(n, 24)).choices[0].message.content for n in (0, 1, 2)}
    assert client.batches.retrieve(batch.id).status == "in_progress", "nothing was beside it"
    wait(daemon, batch, "completed")
    assert {n: answers(client, batch)[f"n{n}"] for n in direct} == direct
    assert batch.id in daemon.ctl("batches").stdout


def test_a_killed_daemon_s_batch_goes_on(daemons: list[Daemon], tmp_path: Path) -> None:
    """Protects: after kill -9 in mid-batch, what was answered is kept, nothing is lost, nor run twice."""
    daemon = start(daemons, tmp_path)
    batch = begin(daemon.client(), tokens=8)
    ended = (event for event in daemon.events() if event["kind"] == "request")
    for _ in range(6):
        next(ended)
    ended.close()
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    with closing(sqlite3.connect(tmp_path / "state" / "seallmd" / "batches.sqlite")) as database:
        query = "SELECT count(*), count(answer) FROM lines"
        total, kept = database.execute(query).fetchone()
    assert total == LINES
    assert 2 <= kept < LINES, "it was not killed in mid-batch"
    again = start(daemons, tmp_path)
    wait(again, batch, "completed")
    assert list(answers(again.client(), batch)) == [f"n{n}" for n in range(LINES)]
    ran = again.log.read_text().count("tier=batch")
    assert ran == LINES - kept, "lines were run again, or not at all"

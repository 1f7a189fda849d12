"""The control socket under fire: whatever is said is answered, and the next command is carried out."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from tests.ctl.conftest import control, node, server

__all__ = ["control", "node", "server"]

WORDS = (
    "op",
    "status",
    "load",
    "evict",
    "cancel",
    "show",
    "service",
    "now",
    "request",
    "requests",
    "plan",
    "quick",
)


async def converse(path: Path, data: bytes) -> list[bytes]:
    """Say it, and read all that comes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer.splitlines()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\x00" * 1000,
        b"[" * 60_000,
        b'{"op":' * 10_000,
        b'{"op":"load","service":"' + b"a" * 60_000 + b'"}',
        b'{"op":"load","service":"../../etc/passwd"}',
        b'{"op":"cancel","request":-1}',
        b'{"op":"cancel","request":1e400}',
        b'{"op":"cancel","request":' + b"9" * 5000 + b"}",
        b'{"op":"evict","service":"quick","now":"yes"}',
        b'{"op":"status","path":"/etc"}',
        b'{"op":"__class__"}',
        b"\xff\xfe{\x00",
    ],
)
async def test_bad_lines(control: Path, line: bytes) -> None:
    """A short error each, without a path, and the connection goes on."""
    wrong, right = await converse(control, line + b'\n{"op":"status"}\n')
    assert json.loads(wrong)["kind"] == "error"
    assert len(wrong) < 500
    assert b"/etc" not in wrong.replace(b"../../etc/passwd", b"")
    assert json.loads(right)["kind"] == "status"


async def test_a_line_without_end(control: Path) -> None:
    """It is bounded: told so, and hung up on."""
    (answer,) = await converse(control, b"x" * (1 << 20))
    assert "bytes" in json.loads(answer)["message"]
    assert json.loads((await converse(control, b'{"op":"status"}\n'))[0])["kind"] == "status"


async def test_fuzzed_lines(control: Path) -> None:
    """Five hundred lines, from noise to almost right: as many answers, each JSON of a known kind."""
    draw = random.Random(11)
    lines = []
    for _ in range(500):
        if draw.random() < 0.3:
            line = draw.randbytes(draw.randint(1, 80)).replace(b"\n", b" ")
        else:
            values = (*WORDS, 1, -1, True, None, [], {}, 1 << 70)
            fields = {draw.choice(WORDS): draw.choice(values) for _ in range(draw.randint(0, 3))}
            line = json.dumps({"op": draw.choice(WORDS), **fields}).encode()
        lines.append(line)
    answers = [json.loads(line) for line in await converse(control, b"\n".join(lines) + b"\n")]
    ends = [answer for answer in answers if answer["kind"] != "progress"]
    assert len(ends) == len(lines)
    assert {end["kind"] for end in ends} <= {"ok", "error", "status", "service", "requests", "plan"}

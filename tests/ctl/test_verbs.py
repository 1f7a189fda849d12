"""seallmctl's smaller verbs: list, show, requests, cancel, top, completion."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from rich.console import Console

from seallmd.core.plan import Plan
from seallmd.core.status import PlanStatus, ServicePlan
from seallmd.ctl import details
from seallmd.ctl.completion import BASH
from seallmd.ctl.main import make_parser
from tests.ctl import terminal
from tests.ctl.conftest import FakeNode
from tests.ctl.test_seallmctl import run


async def test_list(control: Path) -> None:
    """One line for each service; --quiet is for scripts."""
    code, out, _ = await run("--socket", control, "list")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("busy[red]"))
    assert {"resident", "4096", "bfloat16", "org/busy[red]"} <= set(row.split())
    names = ["quick", "slow", "busy[red]", "odd"]
    assert (await run("--socket", control, "list", "--quiet"))[1].split() == names
    assert [s["name"] for s in json.loads((await run("--socket", control, "list", "--json"))[1])] == names


async def test_show(control: Path) -> None:
    """Configuration, shape, places, counters and what was learnt."""
    code, out, _ = await run("--socket", control, "show", "busy[red]")
    assert code == 0
    for part in (
        "LlamaForCausalLM",
        "32 with 8 KV heads of 128+128",
        "34.0 MiB in 34 segments",
        "128 KiB",
        "on device 0",
        "1:15 min ago",
        "61 norms, 211 linear layers",
        "12%, after 77 steps",
        "5.00 ms",
        "1.0 GiB",
    ):
        assert part in out
    code, out, _ = await run("--socket", control, "show", "odd")
    assert "no such architecture" in out
    assert "learnt" not in out
    assert (await run("--socket", control, "show", "nobody"))[0] == 2


async def test_plan(control: Path, node: FakeNode) -> None:
    """Where services are and would be better, the regret against its cost, and the steps in words."""
    _, out, _ = await run("--socket", control, "plan")
    assert "nothing is planned" in out
    assert (await run("--socket", control, "plan", "--json"))[1] == "null\n"
    service = ServicePlan("busy[red]", ((0,), (1, 2)), ((0,),), 0.0452, 0.031, "on device 0, now elsewhere")
    node.planned = PlanStatus(
        current=Plan({"busy[red]": ((0,), (1, 2))}),
        best=Plan({"busy[red]": ((0,),)}),
        regret=12.3,
        cost=40.5,
        next_planning_seconds=75,
        current_normalized_latency=0.0452,
        best_normalized_latency=0.031,
        services=(service,),
        steps=("drop busy[red] on devices 1+2",),
    )
    _, out, _ = await run("--socket", control, "plan")
    assert "busy[red]  0,1+2  0" in out
    assert "over all: 45.2 ms per token now, 31 by the best plan known" in out
    assert "regret 12.3 of 40.5 request-seconds" in out
    assert "  drop busy[red] on devices 1+2" in out
    assert "next planning in 1:15 min" in out
    assert json.loads((await run("--socket", control, "plan", "--json"))[1])["regret"] == 12.3


async def test_requests_and_cancel(control: Path, node: FakeNode) -> None:
    """Who waits sees why; ids are what `cancel` takes."""
    _, out, _ = await run("--socket", control, "requests")
    waiting = next(line for line in out.splitlines() if "quick" in line)
    assert "its model is being read [x]" in waiting
    assert waiting.split()[:6] == ["9", "quick", "default", "waiting", "-", "1:15"]
    assert "12/50" in out
    assert (await run("--socket", control, "cancel", "9"))[:2] == (0, "request 9 is cancelled\n")
    assert (await run("--socket", control, "cancel", "8"))[0] == 2
    assert node.cancelled == [9]


async def test_top_without_a_terminal(control: Path) -> None:
    """Once, without escape codes: for cron and pipes."""
    code, out, err = await run("--socket", control, "top")
    assert (code, err) == (0, "")
    assert "123.5 tokens/s, 3 running, 17 waiting" in out
    assert "\x1b" not in out
    assert "busy[red]" in out


@pytest.mark.parametrize("key", [b"q", b"\x03"])
async def test_top_on_a_terminal(control: Path, key: bytes) -> None:
    """A full screen that q or Ctrl-C leaves, with the terminal as it was before."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 140, 0, 0))
    before = termios.tcgetattr(theirs)
    process = await terminal.start(theirs, "xterm-256color", "--socket", str(control), "top")
    screen = b""
    while b"busy[red]" not in screen:
        screen += await asyncio.to_thread(os.read, ours, 1 << 16)
    assert b"\x1b[?1049h" in screen
    os.write(ours, key)
    while b"\x1b[?1049l" not in screen:
        screen += await asyncio.to_thread(os.read, ours, 1 << 16)
    code = await process.wait()
    assert code == (0 if key == b"q" else 130)
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.00 s"), (59.9, "59.90 s"), (75, "1:15 min"), (7500, "2:05 h")]
)
def test_human_seconds(seconds: float, text: str) -> None:
    """Ages as people read them."""
    assert details.human_seconds(seconds) == text


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals(node: FakeNode, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells fold; no line is broken by the terminal."""
    import msgspec

    report = msgspec.to_builtins(node.status())
    out = Console(width=width, highlight=False)
    details.show_list(out, report["services"])
    details.show_service(out, msgspec.to_builtins(node.detail("busy[red]")))
    details.show_requests(out, msgspec.to_builtins(node.requests()))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


# ----------------------------------------------------------------------------------------- completion


def complete(*words: str, names: str = "") -> list[str]:
    """What bash offers after these words; seallmctl itself is a stand-in that knows `names`."""
    script = (
        f'{BASH}\nseallmctl() {{ echo "{names}"; }}\nCOMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n'
        '_seallmctl\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", "seallmctl", *words], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@needs_bash
def test_completion() -> None:
    """Verbs, options of the verb, and services where a service goes."""
    assert complete("lo") == ["load"]
    assert complete("evict", "--n") == ["--now"]
    assert complete("load", "b", names="alpha beta") == ["beta"]
    assert complete("--socket", "/x", "show", "", names="alpha beta") == ["alpha", "beta"]
    assert complete("status", "", names="alpha") == []


@needs_bash
def test_completion_matches_the_parser() -> None:
    """A verb or option that is added later must be completed too."""
    parser = make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(complete("")) >= set(subparsers.choices)
    for name, verb in subparsers.choices.items():
        options = {option for option in verb._option_string_actions if option.startswith("--")}
        assert set(complete(name, "--")) == options, name

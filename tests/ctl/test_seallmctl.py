"""seallmctl: what it prints and how it exits, in the process and as a process."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from seallmd import __version__
from seallmd.core.status import NodeStatus
from seallmd.ctl import view
from seallmd.ctl.main import main
from tests.ctl.conftest import FakeNode


async def run(*arguments: object) -> tuple[int, str, str]:
    """seallmctl as a user starts it, its output not a terminal."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "seallmd.ctl.main",
        *(str(argument) for argument in arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_status(control: Path) -> None:
    """Everything an operator looks for, on lines that grep finds, without escape codes."""
    code, out, err = await run("--socket", control, "status")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    for part in (
        "yes",
        "resident",
        "17",
        "123.5",
        "1.0 GiB",
        "512 MiB",
        "4096",
        "bfloat16",
        "0.421 s",
    ):
        assert part in rows["busy[red]"]
    assert "reading 25%" in rows["slow"]
    assert "cpu (4 threads)" in rows["0"]
    assert "lost" in rows["1"]
    assert "odd: no such architecture: OddForCausalLM" in out


async def test_status_json(control: Path) -> None:
    """For programs: the report as it is."""
    code, out, _ = await run("status", "--json", "--socket", control)
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)["services"]] == ["quick", "slow", "busy[red]", "odd"]


async def test_load_and_evict(control: Path, node: FakeNode) -> None:
    """Both wait for the end; progress goes to stderr, the result to stdout."""
    node.go.set()
    code, out, err = await run("--socket", control, "load", "slow")
    assert (code, out) == (0, "slow is resident\n")
    assert err == "slow: reading 20%\n"
    assert (await run("--socket", control, "evict", "quick", "--now"))[:2] == (0, "quick is evicted\n")
    assert (await run("--socket", control, "evict", "quick", "--json"))[:2] == (0, '{"ok": true}\n')
    assert (await run("--socket", control, "load", "slow", "--device", "1", "--device", "0"))[0] == 0
    assert node.loaded == [("slow", ()), ("slow", (1, 0))]
    assert node.evicted == [("quick", True), ("quick", False)]


async def test_wrong_name(control: Path) -> None:
    """2 and one line; programs get it as JSON too."""
    code, out, err = await run("--socket", control, "load", "nobody")
    assert (code, out, err) == (2, "", "seallmctl: there is no service 'nobody'\n")
    code, out, _ = await run("--socket", control, "load", "nobody", "--json")
    assert (code, json.loads(out)) == (2, {"ok": False, "error": "there is no service 'nobody'"})


@pytest.mark.parametrize("arguments", [[], ["dance"], ["load"], ["evict", "a", "--later"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """2, as argparse has it."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: seallmctl" in capsys.readouterr().err


async def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 whenever nobody (or somebody else) answers."""
    assert main(["--socket", str(tmp_path / "none.sock"), "status"]) == 3
    assert "is seallmd running?" in capsys.readouterr().err
    assert main(["--socket", str(tmp_path / ("long" * 40)), "status"]) == 3
    for answer, reason in ((b"HTTP/1.1 400\r\n", "is not seallmd"), (b"", "hung up")):

        async def reply(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes = answer
        ) -> None:
            await reader.readline()
            writer.write(text)
            writer.close()

        path = tmp_path / f"{len(answer)}.sock"
        server = await asyncio.start_unix_server(reply, path)
        code = await asyncio.to_thread(main, ["--socket", str(path), "status"])
        server.close()
        assert code == 3
        assert reason in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version needs no daemon."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"seallmctl {__version__}\n"


async def test_starts_light() -> None:
    """A command line that drags torch or the server in takes seconds to say no."""
    code = "import sys, seallmd.ctl.main, seallmd.ctl.view; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    loaded = set(out.decode().split())
    assert not loaded & {"torch", "aiohttp", "msgspec", "tokenizers", "transformers", "asyncio"}
    ours = {name for name in loaded if name.startswith("seallmd")}
    assert ours == {
        "seallmd",
        "seallmd.ctl",
        "seallmd.ctl.client",
        "seallmd.ctl.main",
        "seallmd.ctl.view",
        "seallmd.errors",
        "seallmd.paths",
    }


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_terminal(node: FakeNode, width: int, encoding: str) -> None:
    """Narrow terminals show fewer columns instead of broken lines; names and states are always there."""
    text = draw(node.status(), width, encoding)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for name, state in (
        ("0", "up"),
        ("1", "lost"),
        ("quick", "absent"),
        ("slow", "reading"),
        ("odd", "refused"),
    ):
        assert any(line.startswith(name) and state in line for line in lines)
    text.encode(encoding)


def test_arena_bar(node: FakeNode) -> None:
    """The bar's parts are to scale: half weights, a quarter KV, the rest free with its cached part."""
    bar = next(word for word in draw(node.status(), 140, "ascii").split() if word.startswith("##"))
    assert bar == "#" * 15 + "=" * 7 + "--" + "." * 6


def draw(status: NodeStatus, width: int, encoding: str) -> str:
    import io

    import msgspec

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    view.show_status(Console(file=file, width=width, highlight=False), msgspec.to_builtins(status))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_progress_on_a_terminal() -> None:
    """A moving bar with the state, gone when it is over."""
    import io

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with view.JobView(console, "a[b]") as job:
        job.told({"state": "copying", "stage": 0.5})
        job._bar.refresh()
    assert "a[b]: copying" in file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"), (3 << 41, "6.0 TiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    """Sizes as people read them."""
    assert view.human_bytes(count) == text

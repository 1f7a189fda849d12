"""seallmctl's verbs that change something or look on: pin, drain, reload, events, bench."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from seallmd.api.control import ControlServer
from seallmd.core import events as ev
from seallmd.ctl import bench
from seallmd.ctl.bench import Load, Sample
from seallmd.errors import ConfigError
from tests.api.engine_double import FakeEngine
from tests.ctl.conftest import FakeNode
from tests.ctl.test_seallmctl import run


async def test_pin_and_unpin(control: Path, node: FakeNode) -> None:
    """The same order with and without its sign; a wrong name is a wrong name."""
    code, out, _ = await run("--socket", control, "pin", "quick")
    assert (code, out) == (0, "quick is pinned\n")
    assert json.loads((await run("--socket", control, "unpin", "quick", "--json"))[1]) == {"ok": True}
    assert node.operated == [ev.PinWanted(1, "quick"), ev.PinWanted(1, "quick", pinned=False)]
    code, _, err = await run("--socket", control, "pin", "nobody")
    assert (code, "nobody" in err) == (2, True)


async def test_drains(control: Path, node: FakeNode) -> None:
    """A service, a device, or everything; and back."""
    for arguments in (("drain", "quick"), ("drain", "--device", "1"), ("undrain",)):
        code, out, _ = await run("--socket", control, *arguments)
        assert (code, "drained" in out) == (0, True)
    assert node.operated == [
        ev.ServiceDrainWanted(1, "quick"),
        ev.DeviceDrainWanted(1, 1),
        ev.NodeDrainWanted(1, drained=False),
    ]
    assert (await run("--socket", control, "drain", "quick", "--device", "1"))[0] == 2


async def test_a_drain_waits(control: Path, node: FakeNode) -> None:
    """Whoever takes a machine out of service wants to know when it is."""
    command = asyncio.ensure_future(run("--socket", control, "drain", "slow"))
    await node.begun.wait()
    assert not command.done()
    node.go.set()
    assert (await command)[0] == 0


async def test_reload(server: ControlServer, control: Path) -> None:
    """What changed, what waits for a restart; a wrong file is exit code 2, with file and line."""
    server.reload = lambda: (["service b"], ["http.port"])
    code, out, _ = await run("--socket", control, "reload")
    assert (code, out) == (0, "changed: service b\nneeds a restart: http.port\n")
    assert json.loads((await run("--socket", control, "reload", "--json"))[1])["restart"] == ["http.port"]

    def wrong() -> tuple[list[str], list[str]]:
        raise ConfigError("seallmd.toml:7: unknown field `colour`")

    server.reload = wrong
    code, _, err = await run("--socket", control, "reload")
    assert code == 2
    assert "stays as it was: seallmd.toml:7:" in err


async def test_events(control: Path, node: FakeNode) -> None:
    """The last ones, for people and for programs."""
    node.feed.tell("service", "quick", "resident on device 0 [x]")
    node.feed.tell("operator", "", "NodeDrainWanted")
    code, out, _ = await run("--socket", control, "events")
    assert code == 0
    first, second = out.splitlines()
    assert "quick: resident on device 0 [x]" in first
    assert "operator" in second
    out = (await run("--socket", control, "events", "--last", "1", "--json"))[1]
    assert [json.loads(line)["number"] for line in out.splitlines()] == [2]


async def test_following_ends_with_the_client(control: Path, node: FakeNode) -> None:
    """New events come at once; when the client hangs up, nothing of it stays."""
    reader, writer = await asyncio.open_unix_connection(str(control))
    writer.write(b'{"op":"events","last":0,"follow":true}\n')
    line = asyncio.create_task(reader.readline())
    while not line.done():  # who follows from now on hears nothing of before
        node.feed.tell("service", "", "event")
        await asyncio.sleep(0)
    assert json.loads(line.result())["event"]["text"] == "event"
    mine = {asyncio.current_task()}
    writer.close()
    await writer.wait_closed()
    await asyncio.wait(asyncio.all_tasks() - mine, timeout=20)
    assert asyncio.all_tasks() == mine, "somebody still follows for nobody"


# ---------------------------------------------------------------------------------------------- bench


def test_figures() -> None:
    """Failures count as requests and not as speed; percentiles are values that were measured."""
    load = Load(["a", "b"], 4, 2, 10, 3)
    samples = [
        Sample("a", 0.1, 1.0, 10, 3, [0.2, 0.4]),
        Sample("a", 0.3, 2.0, 10, 3, [0.6]),
        Sample("b", 0.2, 4.0, 10, 3, []),
        Sample("b", error="it is drained"),
    ]
    report = bench.report(load, samples, seconds=4.0)
    total, of_b = report["total"], report["services"]["b"]
    assert (total["requests"], total["failed"], total["requests_per_second"]) == (4, 1, 0.75)
    assert (total["output_tokens_per_second"], total["total_tokens_per_second"]) == (2.25, 9.75)
    assert total["first_token"]["p50"] == 0.2
    assert total["between_tokens"]["max"] == 0.6
    assert of_b["between_tokens"] is None
    assert report["errors"] == ["it is drained"]


async def test_bench_asks_the_server(
    control: Path,
    runner: web.AppRunner,  # noqa: ARG001 - it serves
    engine: FakeEngine,
) -> None:
    """Every request of the load arrives, as different prompts of the right length, and is reported."""
    load = ("--requests", "6", "--clients", "3", "--prompt-tokens", "9", "--output-tokens", "5")
    code, out, err = await run("--socket", control, "bench", "m", *load, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["total"]["requests"], report["total"]["failed"]) == (6, 0)
    assert {len(generation.prompt) for generation in engine.submitted} == {9}
    assert len({generation.prompt for generation in engine.submitted}) == 6
    code, out, _ = await run("--socket", control, "bench", "m", "nobody", *load)
    assert code == 1, "requests failed, and nobody said so"
    assert "does not exist" in out


@pytest.mark.parametrize("arguments", [("events", "--last", "0"), ("bench", "--clients", "0"), ("pin",)])
async def test_wrong_usage(control: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 2, as for every wrong use."""
    assert (await run("--socket", control, *arguments))[0] == 2

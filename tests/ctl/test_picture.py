"""The live parts of `top`: sparklines, traffic, and arena maps."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console, Group

from seallmd.ctl import picture
from tests.ctl.conftest import LATENCIES, FakeNode


def report_of(node: FakeNode) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the control socket tells: status, and maps with latencies."""
    pictures = {"maps": node.arena_maps(30), "latencies": LATENCIES}
    return msgspec.to_builtins(node.status()), msgspec.to_builtins(pictures)


def drawn(out: Console, *parts: Any) -> str:
    assert isinstance(out.file, io.StringIO)
    out.print(Group(*parts))
    return out.file.getvalue()


def console(width: int, encoding: str = "utf-8") -> Console:
    return Console(file=_File(encoding), width=width, highlight=False)


class _File(io.StringIO):
    """A terminal's encoding without a terminal."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def test_sparklines() -> None:
    """Scaled to the highest; what is there at all is seen; the newest is on the right."""
    assert picture.sparkline([0, 1, 8], 5) == "   ▁█"
    assert picture.sparkline([0, 0.001, 8], 3) == " ▁█"
    assert picture.sparkline([], 3) == picture.sparkline([0, 0], 3) == "   "
    assert picture.sparkline(range(100), 4) == "████"
    assert picture.sparkline([0, 8], 2, ascii_only=True) == " @"


def test_history_is_bounded() -> None:
    """`top` may run for weeks."""
    history = picture.History()
    for value in range(1000):
        history.add("a", value)
    assert list(history.of("a")) == list(range(1000 - picture.HISTORY, 1000))


def test_traffic_and_maps(node: FakeNode) -> None:
    """Output, queue and latencies of those who are used; capitals are weights, small letters KV."""
    out = console(140)
    report, pictures = report_of(node)
    history = picture.History()
    text = drawn(out, picture.traffic(out, report, pictures, history), *picture.maps(out, report, pictures))
    row = next(line for line in text.splitlines() if line.startswith("busy[red]"))
    for part in ("123.5", "17", "250 ms", "2500 ms", "40 ms", "125 ms", "█"):
        assert part in row
    assert "odd" not in text, "nobody uses it"
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("0 ")]
    assert line.split() == ["0", "Cca" + "·" * 27]
    assert "C busy[red]" in text
    assert "A quick" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit(node: FakeNode, width: int) -> None:
    """No line is longer than the terminal, and ASCII is enough where there is nothing else."""
    out = console(width, "ascii")
    report, pictures = report_of(node)
    parts = picture.traffic(out, report, pictures, picture.History()), *picture.maps(out, report, pictures)
    text = drawn(out, *parts)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width

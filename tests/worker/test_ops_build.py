"""Compiling the operations: once per machine, never half, and nothing lost where it cannot be done."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from seallmd.worker import ops
from seallmd.worker.ops import build
from seallmd.worker.ops.build import BuildFailed, make_library


def quiet(_: str) -> None:
    pass


def compiler(tmp_path: Path, body: str) -> str:
    """A program in place of a compiler: it answers --version, and counts its runs."""
    program = tmp_path / "cc"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho run >> {tmp_path}/runs\n'
        f"for out; do :; done\n{body}\n"  # $out: the last argument
    )
    program.chmod(0o755)
    return str(program)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def test_compiles_once(tmp_path: Path) -> None:
    """The second start finds the library of the first."""
    fake, said = compiler(tmp_path, 'echo library > "$out"'), []
    first = make_library(tmp_path / "cache", said.append, [fake])
    assert make_library(tmp_path / "cache", said.append, [fake]) == first
    assert runs(tmp_path) == len(said) == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Workers that start together compile once, and all get the whole library."""
    fake = compiler(tmp_path, 'sleep 0.3; echo library > "$out"')
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(target=make_library, args=(tmp_path / "cache", quiet, [fake])) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert runs(tmp_path) == 1
    assert len(list((tmp_path / "cache" / "ops").glob("*.so"))) == 1


def test_a_compiler_speaks_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first error is looked for by that word, whatever language the operator has set."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    body = 'word=Fehler; [ "$LC_ALL" = C ] && word=error; echo "ops.cpp:1: $word: no" >&2; exit 1'
    with pytest.raises(BuildFailed, match="error: no"):
        make_library(tmp_path / "cache", quiet, [compiler(tmp_path, body)])


def test_a_failing_compiler_leaves_nothing(tmp_path: Path) -> None:
    """What it wrote before it failed is never loaded; its first error is told."""
    fake = compiler(tmp_path, 'echo half > "$out"; echo "ops.cpp:1: error: no such thing" >&2; exit 1')
    with pytest.raises(BuildFailed, match="no such thing"):
        make_library(tmp_path / "cache", quiet, [fake])
    assert [file.name for file in (tmp_path / "cache" / "ops").iterdir()] == ["lock"]


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version never runs the old one's code."""
    fake = compiler(tmp_path, 'echo library > "$out"')
    first = make_library(tmp_path / "cache", quiet, [fake])
    changed = tmp_path / "sources"
    changed.mkdir()
    (changed / "ops.cpp").write_text("// changed")
    monkeypatch.setattr(build, "_SOURCES", changed)
    assert make_library(tmp_path / "cache", quiet, [fake]) != first


def test_others_must_not_write_there(tmp_path: Path) -> None:
    """The library is code: a directory that anybody can write to is not used."""
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops").chmod(0o777)
    with pytest.raises(BuildFailed, match="others"):
        make_library(tmp_path, quiet, [compiler(tmp_path, "exit 0")])


@pytest.mark.parametrize(
    ("body", "reason"),
    [(None, "no C++ compiler"), ("exit 1", "failed"), ('echo junk > "$out"', "file too short")],
)
def test_falls_back_to_torch(
    body: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a usable library the worker runs on torch, and says why."""

    def find(_: str) -> str | None:
        return compiler(tmp_path, body) if body else None

    monkeypatch.setattr(build.shutil, "which", find)
    assert reason in ops.start(tmp_path / "cache", quiet)
    assert ops.compiled() is None

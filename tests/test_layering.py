"""Who may import whom, and other promises that can be read off the source.

Owns the table of layers (docs/design.md says why they are so). Reads source with `ast`; imports nothing of
the project, so that a module which does not even import is still checked.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "seallmd"
MOST_LINES = 500


@dataclass(frozen=True)
class Layer:
    """What the modules of a layer may import.

    project: modules of this project, each with all that lies below it (the package's own name means its
    version alone). libraries: third-party packages, None = any. barred: parts of the standard library that
    are out of bounds.
    """

    project: tuple[str, ...]
    libraries: frozenset[str] | None = None
    barred: frozenset[str] = frozenset()


# What would give decisions a clock, an outside or chance: then a journal could not be run again.
_CLOCKS = frozenset({"time", "datetime"})
_OUTSIDE = frozenset({"io", "logging", "multiprocessing", "os", "pathlib", "signal", "socket", "subprocess"})
_CHANCE = frozenset({"asyncio", "concurrent", "random", "secrets", "threading", "uuid"})
_IMPURE = _CLOCKS | _OUTSIDE | _CHANCE
_CORE = ("seallmd.core", "seallmd.errors")
_CORE_STRUCTS = tuple(
    f"seallmd.core.{name}" for name in ("events", "messages", "settings", "shapes", "status")
)
_RUNTIME = (
    "seallmd.runtime",
    *_CORE,
    *(f"seallmd.{name}" for name in ("cgroup", "config", "files", "paths")),
)
_LIGHT = frozenset({"msgspec"})

# The longest name that fits a module is its layer. A module that no name fits is a breach: it has no place.
LAYERS = {
    "seallmd": Layer(()),  # the package's own __init__ alone
    "seallmd.__main__": Layer(("seallmd.runtime.daemon", "seallmd.runtime.forkserver")),
    "seallmd.errors": Layer((), frozenset()),
    "seallmd.paths": Layer(("seallmd.errors",), frozenset()),
    "seallmd.files": Layer((), frozenset()),
    "seallmd.cgroup": Layer((), frozenset()),
    "seallmd.config": Layer(("seallmd.core.settings", "seallmd.api.settings", "seallmd.errors"), _LIGHT),
    "seallmd.core": Layer(_CORE, _LIGHT, _IMPURE),
    "seallmd.core.placement": Layer(_CORE, _LIGHT | {"numpy", "scipy"}, _IMPURE),
    "seallmd.sim": Layer(("seallmd.sim", *_CORE)),
    "seallmd.runtime": Layer(_RUNTIME),
    "seallmd.runtime.daemon": Layer((*_RUNTIME, "seallmd", "seallmd.api")),
    "seallmd.api": Layer(
        (
            *("seallmd", "seallmd.api", "seallmd.runtime.face", "seallmd.runtime.feed"),
            *(*_CORE_STRUCTS, "seallmd.errors", "seallmd.paths"),
        )
    ),
    "seallmd.ui": Layer(()),
    "seallmd.worker": Layer(
        (
            *("seallmd.worker", "seallmd.core.framing", "seallmd.core.messages", "seallmd.core.shapes"),
            *("seallmd.cgroup", "seallmd.errors", "seallmd.files"),
        )
    ),
    "seallmd.worker.forkserver": Layer(("seallmd.worker", "seallmd.core.messages", "seallmd.core.forks")),
    "seallmd.ctl": Layer(("seallmd", "seallmd.ctl", "seallmd.paths", "seallmd.errors"), frozenset({"rich"})),
}

# Formats that run code when they are read.
_CODE_FORMATS = frozenset({"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})


# --------------------------------------------------------------------------------------- the checker


def layer_breaches(root: Path) -> list[str]:
    """Every import of the package below `root` that its layer does not allow, as `file:line: what`."""
    found = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        module = _module_name(file, root)
        layer = _layer_of(module)
        where = file.relative_to(root)
        if layer is None:
            found.append(f"{where}:1: {module} has no place in the table of layers")
            continue
        for line, name in _imports(ast.parse(file.read_bytes()), root):
            if reason := _objection(layer, name):
                found.append(f"{where}:{line}: {module} may not import {name}: {reason}")
    return found


def _module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer_of(module: str) -> Layer | None:
    parts = module.split(".")
    if len(parts) == 1:
        return LAYERS.get(module)
    # Down to two parts: a new module or folder of the package does not fall under the package's __init__.
    names = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((LAYERS[name] for name in names if name in LAYERS), None)


def _imports(tree: ast.AST, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever in the file: a late import is one all the same."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, _imported(base, alias.name, root)) for alias in node.names)


def _imported(base: str, name: str, root: Path) -> str:
    """`from a.b import c` names the module a.b.c if there is one, else something in a.b."""
    path = root.joinpath(*base.split("."), name)
    return f"{base}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else base


def _objection(layer: Layer, name: str) -> str:
    """Why the layer may not import this; empty when it may."""
    top = name.partition(".")[0]
    if name.startswith("."):
        return "imports are written with the full name"
    if top == PACKAGE:
        return "" if any(_covers(allowed, name) for allowed in layer.project) else "another layer's"
    if top in sys.stdlib_module_names:
        return "out of bounds here" if top in layer.barred else ""
    return "" if layer.libraries is None or top in layer.libraries else "not among its libraries"


def _covers(allowed: str, name: str) -> bool:
    return name == allowed or (allowed != PACKAGE and name.startswith(f"{allowed}."))


def unsafe_reads(tree: ast.AST, root: Path) -> list[int]:
    """Lines that could run code out of a file: pickles and what reads or writes them, remote model code."""
    lines = [line for line, name in _imports(tree, root) if name.partition(".")[0] in _CODE_FORMATS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            lines += [node.lineno for alias in node.names if alias.name in ("load", "save")]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            lines += [] if refused else [node.lineno]
    return lines


# ------------------------------------------------------------------------------- the project is checked


def _source_files() -> list[Path]:
    return [file for folder in (PACKAGE, "tests", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_imports_keep_to_the_layers() -> None:
    """Protects the layering of docs/design.md: pure core, worker and daemon that share messages alone."""
    assert layer_breaches(ROOT) == []


def test_files_are_short() -> None:
    """Protects readers: a file over the limit is two things that want two names."""
    lengths = {file.relative_to(ROOT): len(file.read_bytes().splitlines()) for file in _source_files()}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_modules_say_what_they_own() -> None:
    """Protects strangers: every module opens with a docstring (an empty __init__ has nothing to say)."""
    trees = {file.relative_to(ROOT): ast.parse(file.read_bytes()) for file in _source_files()}
    assert [file for file, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []


def test_nothing_that_is_read_can_run_code() -> None:
    """Protects the machine from what others wrote: no pickle in any file or socket, no remote model code."""
    trees = {file.relative_to(ROOT): ast.parse(file.read_bytes()) for file in _source_files()}
    assert {file: lines for file, tree in trees.items() if (lines := unsafe_reads(tree, ROOT))} == {}


# ------------------------------------------------------------------------------- the checker is checked


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/node.py", "import asyncio"),
        ("core/node.py", "from time import monotonic"),
        ("core/node.py", "import torch"),
        ("core/node.py", "def late():\n    import os.path"),
        ("core/node.py", "import numpy"),
        ("core/node.py", "from seallmd import runtime"),
        ("core/node.py", "from . import arena"),
        ("sim/world.py", "from seallmd.runtime.engine import Engine"),
        ("runtime/engine.py", "import seallmd.api.server"),
        ("runtime/engine.py", "from seallmd.worker.main import run"),
        ("api/server.py", "from seallmd.runtime import engine"),
        ("api/server.py", "from seallmd.core.node import Node"),
        ("worker/main.py", "from seallmd.core import settings"),
        ("ctl/main.py", "from seallmd.api.control import Status"),
        ("ctl/main.py", "import msgspec"),
        ("paths.py", "import seallmd.core.events"),
        ("__init__.py", "from seallmd import errors"),
        ("novelty/thing.py", "import json"),
    ],
)
def test_the_checker_sees_a_breach(tmp_path: Path, file: str, source: str) -> None:
    """Protects the test of the layers itself: one that cannot fail protects nothing."""
    _make_tree(tmp_path, file, source)
    assert [line.partition(":")[0] for line in layer_breaches(tmp_path)] == [f"seallmd/{file}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "core/node.py",
            "import heapq, msgspec\nfrom seallmd.core import arena\nimport seallmd.errors",
        ),
        ("core/placement.py", "import numpy\nfrom scipy import optimize"),
        ("runtime/daemon.py", "from seallmd import __version__\nfrom seallmd.api import server"),
        ("api/server.py", "from seallmd.runtime import face\nfrom seallmd.core.events import Finish"),
        ("worker/main.py", "import torch\nfrom seallmd.core import messages"),
        ("ctl/main.py", "import os\nimport rich.table\nfrom seallmd import __version__"),
    ],
)
def test_the_checker_lets_the_layers_work(tmp_path: Path, file: str, source: str) -> None:
    """Protects the layers' own imports from being refused."""
    _make_tree(tmp_path, file, source)
    assert layer_breaches(tmp_path) == []


def _make_tree(root: Path, file: str, source: str) -> None:
    """A small package in which the names of the cases exist, and one file with something in it."""
    modules = (
        "errors.py core/arena.py core/messages.py core/settings.py core/events.py core/node.py api/server.py "
        "runtime/face.py runtime/engine.py worker/main.py"
    )
    for name in (*modules.split(), file):
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name == file else "")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.save(weights, path)",
        "from torch import load",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
    ],
)
def test_the_checker_sees_unsafe_reads(source: str) -> None:
    """Protects the test of unsafe reads itself."""
    assert unsafe_reads(ast.parse(source), ROOT) == [1]

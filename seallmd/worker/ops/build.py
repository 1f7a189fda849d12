"""From the C++ beside this file to a shared library for this machine.

Owns the compiler's command and the cache of its results. Must not know what is in the library.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from seallmd.files import partial_of

_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-fPIC", "-shared")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_SECONDS = 120
_KEPT = 4  # libraries of other versions or machines that share the cache


class BuildFailed(Exception):
    """There is no library, and why (one line)."""


def make_library(cache: Path, say: Callable[[str], None], compilers: Sequence[str] = _COMPILERS) -> Path:
    """The library for this machine, from `cache` or compiled into it. Raises BuildFailed, OSError.

    The name is a digest of everything that the result depends on, so a machine that shares its home with a
    different one, or a new version, finds its own. Of processes that start together one compiles.
    say: told before the compiler runs.
    """
    compiler = next((path for name in compilers if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildFailed("no C++ compiler was found")
    directory = cache / "ops"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(directory)
    library = directory / f"{_digest(compiler)}.so"
    if library.exists():
        return library
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if we are killed
        if not library.exists():  # another process may have been quicker
            say(f"compiling the operations for this machine with {compiler}, once")
            _compile(compiler, library)
            _forget_old(directory)
    return library


def _compile(compiler: str, library: Path) -> None:
    partial = partial_of(library)
    command = [compiler, *_FLAGS, str(_SOURCES / "ops.cpp"), "-o", str(partial)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},  # "error" in other languages is another word
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise BuildFailed(f"the compiler failed: {(errors or ['no reason given'])[0].strip()[:200]}")
        os.replace(partial, library)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"the compiler took more than {_TIMEOUT_SECONDS} s") from error
    finally:
        partial.unlink(missing_ok=True)


def _digest(compiler: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
    digest = hashlib.sha256(repr((compiler, version.stdout, _FLAGS, _cpu())).encode())
    for file in sorted(_SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> list[str]:
    """What -march=native looks at: model and features of the first core."""
    text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return re.findall(r"^(?:vendor_id|cpu family|model|flags|Features|CPU \w+)\s*:.*$", text, re.MULTILINE)


def _require_own(directory: Path) -> None:
    """What lies there is loaded as code: nobody else may be able to put it there."""
    status = directory.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise BuildFailed(f"others may write to {directory}")


def _forget_old(directory: Path) -> None:
    libraries = sorted(directory.glob("*.so"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in libraries[_KEPT:]:
        file.unlink(missing_ok=True)  # a process that has loaded it keeps its mapping

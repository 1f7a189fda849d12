"""The Triton operations, run by Triton's interpreter on the CPU.

How they run is decided when triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


HERE = Path(__file__).parent
CASES = ("triton_models", "triton_cases", "flash_cases")
Done = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Done]]:
    """All of them, as many at a time as there are processors: each computes on one."""
    commands = {case: ["pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{case}.py")] for case in CASES}
    cache = str(tmp_path_factory.mktemp("triton"))

    def run(module: list[str], interpret: bool) -> subprocess.CompletedProcess[str]:
        said = {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", *module],
            env={**os.environ, **said},
            capture_output=True,
            text=True,
            check=False,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            **{case: pool.submit(run, command, True) for case, command in commands.items()},
            "compiled": pool.submit(run, ["tests.worker.triton_compile"], False),
        }


def assert_well(run: Done) -> None:
    """It ended well."""
    done = run.result()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cases", CASES)
def test_in_the_interpreter(runs: dict[str, Done], cases: str) -> None:
    """Every case of the file."""
    assert_well(runs[cases])


def test_compiled_for_a_gpu(runs: dict[str, Done]) -> None:
    """The compiler takes every operation, and no program needs more fast memory than small GPUs have."""
    assert_well(runs["compiled"])

"""The Triton operations, run by Triton's interpreter on the CPU.

How they run is decided when triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_compiled_for_a_gpu(tmp_path: Path) -> None:
    """The compiler takes every operation, and no program needs more fast memory than small GPUs have."""
    command = [sys.executable, "-m", "tests.worker.triton_compile"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cases", ["triton_cases", "triton_models", "flash_cases"])
def test_in_the_interpreter(cases: str) -> None:
    """Every case of the file."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(f"{cases}.py")),
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

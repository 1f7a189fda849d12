"""Made-up input for every parser of ours: the short form of `python -m tests.hostile.fuzz`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.parsers import PARSERS

ROOT = Path(__file__).parents[2]
RUNS, SECONDS = 20_000, 60


@pytest.mark.parametrize("name", PARSERS)
def test_honest_input_is_taken(name: str) -> None:
    """Else fuzzing would see nothing but the first refusal; an input that is cut is no defect either."""
    parser = PARSERS[name]
    for example in parser.examples:
        accepted = parser.accepts(example)
        assert accepted or name in ("model files", "service manager", "answers")
        for end in range(0, len(example), 1 + len(example) // 100):
            parser.accepts(example[:end])


@pytest.mark.skipif(find_spec("atheris") is None, reason="there is no atheris for this Python")
def test_nothing_but_refusals_guided_by_coverage(tmp_path: Path) -> None:
    """No other error, no hang, no growth; what is found is in the output."""
    done = subprocess.run(
        [
            # A shell in between: what a process has of memory at most begins with what its parent had, and
            # that is this one, with models in it.
            "sh",
            "-c",
            '"$@"; exit $?',
            "sh",
            sys.executable,
            "-m",
            "tests.hostile.fuzz",
            "--runs",
            str(RUNS),
            "--seconds",
            str(SECONDS),
            "--seed",
            "1",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    # An exception is told on the one, what libFuzzer makes of it on the other.
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Done " in done.stderr


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(PARSERS)), data=st.data())
def test_nothing_but_refusals_of_damaged_examples(name: str, data: st.DataObject) -> None:
    """The same where atheris is not: honest input with a part of it exchanged."""
    parser = PARSERS[name]
    example = data.draw(st.sampled_from(parser.examples))
    begin = data.draw(st.integers(0, len(example)))
    end = data.draw(st.integers(begin, min(len(example), begin + 16)))
    parser.accepts(example[:begin] + data.draw(st.binary(max_size=16)) + example[end:])


def test_a_defect_is_found() -> None:
    """A parser that raises what it should not is told on."""
    with pytest.raises(ZeroDivisionError):
        PARSERS["control"]._replace(read=lambda data: print(1 // len(data))).accepts(b"")

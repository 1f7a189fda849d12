"""Coverage-guided fuzzing of every parser of ours.

    python -m tests.hostile.fuzz [--parser NAME] [--seconds 600]

Made-up input comes from atheris (libFuzzer), which keeps what reaches code that nothing else has reached. One
process tries all parsers, or the one that is named. What is found lies in a file `crash-*`, `timeout-*` or
`oom-*` where it runs; to try it again, give that file: `python -m tests.hostile.fuzz FILE`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

SLOW_SECONDS = 5  # an input that takes longer is a finding
MEMORY_MIB = 2048  # a process that needs more is one
LONGEST_BYTES = 4096  # of an input

with atheris.instrument_imports(include=["seallmd"]):
    from tests.hostile.parsers import PARSERS


def main() -> None:
    """The command; libFuzzer ends the process, with a code that is not 0 for a finding."""
    parser = argparse.ArgumentParser(description="Made-up input for every parser.")
    parser.add_argument("input", type=Path, nargs="?", help="try this file alone")
    parser.add_argument("--parser", choices=list(PARSERS), help="the one to try; all in turn by default")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--runs", type=int, default=-1, help="end after so many inputs")
    parser.add_argument("--seed", type=int, default=0, help="0: of the clock")
    options = parser.parse_args()
    names = [options.parser] if options.parser else list(PARSERS)

    def one(data: bytes) -> None:
        """The first byte says which parser."""
        if data:
            PARSERS[names[data[0] % len(names)]].accepts(data[1:])

    arguments = [sys.argv[0], f"-timeout={SLOW_SECONDS}", f"-rss_limit_mb={MEMORY_MIB}"]
    if options.input:
        atheris.Setup([*arguments, str(options.input)], one)
        atheris.Fuzz()
    with tempfile.TemporaryDirectory(prefix="seallmd-corpus-") as corpus:
        for number, name in enumerate(names):
            for index, example in enumerate(PARSERS[name].examples):
                (Path(corpus) / f"{number}-{index}").write_bytes(bytes([number]) + example)
        arguments += [f"-max_total_time={options.seconds}", f"-runs={options.runs}", f"-seed={options.seed}"]
        atheris.Setup([*arguments, f"-max_len={LONGEST_BYTES}", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

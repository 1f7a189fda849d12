"""GGUF file in, safetensors directory out: `python -m seallmd.worker.convert SRC.gguf DST_DIR`.

Owns the conversion alone. A program of its own because it takes a minute and much memory, and because a
damaged file may bring down the process that reads it. Must not know services or sockets.

The weights are dequantised to bfloat16: a GGUF saves disk, not device memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
from pathlib import Path

from seallmd.files import partial_of
from seallmd.worker.process import bind_to_parent, one_line, quiet_libraries


def convert(source: Path, target: Path) -> None:
    """Write the model and tokenizer of `source` to the new directory `target`; one line of output per stage.

    Everything is written to a sibling first and renamed at the end, so a half-written `target` never exists.
    Raises whatever transformers raises for a file it cannot read, FileExistsError if `target` exists.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_libraries()
    if target.exists():
        raise FileExistsError(f"{target.name} exists already")
    partial = partial_of(target)
    partial.mkdir(parents=True)
    try:
        print(f"reading {source.name}", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        print("writing safetensors", flush=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():  # weights come out as 0600: the daemon may run as another user
            file.chmod((partial / "config.json").stat().st_mode)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("done", flush=True)


def main() -> int:
    """Command line; the exit status is 1 and the last line of stderr the reason when it fails."""
    parser = argparse.ArgumentParser(description="convert a GGUF file to a safetensors directory")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--parent", type=int, help="end when the process with this id does")
    args = parser.parse_args()
    if args.parent is not None:
        bind_to_parent(args.parent)
    # Dequantising makes eight times as much of the smallest kinds, and copies on the way.
    limit = 32 * args.source.stat().st_size + (4 << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        convert(args.source, args.target)
    except Exception as error:  # noqa: BLE001 - process boundary: the reason goes to whoever started it
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

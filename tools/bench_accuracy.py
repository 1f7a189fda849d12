"""What each dtype costs in accuracy: perplexity, and how often it chooses what float32 chooses.

    python -m tools.bench_accuracy models/smollm2-135m-instruct --text docs/*.md

No daemon: the worker's own code in this process, as in `bench_engine`. The text is cut into windows; of each,
every token behind the first is predicted: perplexity, and the share of positions at which the likeliest token
is float32's. Beginnings of windows are continued greedily: the share of continuations that equal float32's
from first to last token, and how far they do on the average. The last line counts the same for transformers'
own `generate` in float32.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from seallmd.worker.process import quiet_libraries
from tools.bench_engine import Engine


class Seen(NamedTuple):
    """What an engine said of the text. best: the likeliest token behind each position of each window."""

    name: str
    perplexity: float
    best: list[torch.Tensor]
    answers: list[list[int]]


def windows(ids: list[int], tokens: int, most: int) -> list[list[int]]:
    """Pieces of `ids` of so many tokens each; what is left at the end is dropped."""
    return [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)][:most]


def common_prefix(ours: list[int], theirs: list[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))


def examine(name: str, engine: Engine, pieces: list[list[int]], prompts: list[list[int]], new: int) -> Seen:
    """Let an engine read and continue."""
    loss, best, count = 0.0, [], 0
    for piece in pieces:
        said = engine.logits(piece)[:-1]
        wanted = torch.tensor(piece[1:])
        loss += float(torch.nn.functional.cross_entropy(said, wanted, reduction="sum"))
        count += len(wanted)
        best.append(said.argmax(-1))
    engine.run(prompts, new)
    return Seen(name, math.exp(loss / count), best, engine.drawn)


def compare(seen: Seen, exact: Seen) -> str:
    """A line of the table."""
    same = torch.cat(seen.best) == torch.cat(exact.best)
    prefixes = [common_prefix(a, b) for a, b in zip(seen.answers, exact.answers, strict=True)]
    whole = sum(n == len(a) for n, a in zip(prefixes, exact.answers, strict=True))
    return (
        f"{seen.name:28} {seen.perplexity:10.4f} {seen.perplexity / exact.perplexity - 1:+9.3%}"
        f" {same.float().mean():9.2%} {whole:5} of {len(prefixes):3} {sum(prefixes) / len(prefixes):8.1f}"
    )


def generated(directory: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy continuations by transformers in float32, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # on and on, as the engine does here
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
            )
            found.append(out[0, len(prompt) :].tolist())
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="what each dtype costs in accuracy")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="compare within one text only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--windows", type=int, default=40, help="at most so many")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a window that are continued")
    parser.add_argument("--prompts", type=int, default=32, help="how many windows are")
    parser.add_argument("--new", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--torch", action="store_true", help="also without the compiled operations")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    quiet_libraries()
    text = "\n".join(file.read_text() for file in options.text)
    ids = Tokenizer.from_file(str(options.model / "tokenizer.json")).encode(text).ids
    pieces = windows(ids, options.window, options.windows)
    if not pieces:
        raise SystemExit(f"bench_accuracy: the text has {len(ids)} tokens, a window {options.window}")
    prompts = [piece[: options.prompt] for piece in pieces[: options.prompts]]
    print(f"{len(text)} characters: {len(pieces)} windows of {options.window} tokens; {len(prompts)} prompts")
    print(f"{'':28} perplexity            same best  same answers  common prefix")
    exact: Seen | None = None
    with tempfile.TemporaryDirectory() as cache:
        for compiled in (True, False) if options.torch else (True,):
            for dtype in options.dtypes:
                tokens = max(options.window, len(prompts) * (options.prompt + options.new + 64))
                engine = Engine(options.model, dtype, tokens, Path(cache), compiled)
                name = f"{dtype}, {'compiled' if compiled else 'plain torch'}"
                seen = examine(name, engine, pieces, prompts, options.new)
                exact = exact or seen
                print(compare(seen, exact), flush=True)
    assert exact is not None
    theirs = generated(options.model, prompts, options.new)
    same = sum(a == b for a, b in zip(exact.answers, theirs, strict=True))
    print(f"transformers, float32: {same} of {len(theirs)} answers are those of the first line")


if __name__ == "__main__":
    main()

"""vLLM's side of `bench_engine`: holds one model and times what it is asked for.

    python -m tools.bench_engine MODEL --vllm PYTHON

starts this file with another interpreter, one that has vLLM; so it imports nothing of seallmd. Each line is
one JSON object: `{"prompts": [[token, ...], ...], "new": N}` is answered by `{"seconds": S}`, and before
the first comes `{"ready": VERSION}`.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(model: str, dtype: str, length: int) -> None:
    """Serve until standard input ends. length: the most tokens of a request, prompt and answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its log to standard output
    import vllm  # says something as it is imported

    options = {"dtype": dtype, "max_model_len": length, "seed": 0, "disable_log_stats": True}
    # Repeats have the same prompts, and none of the others looks for them again.
    engine = vllm.LLM(model, enable_prefix_caching=False, **options)
    print(json.dumps({"ready": vllm.__version__}), file=out, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        greedy = vllm.SamplingParams(temperature=0, max_tokens=work["new"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": tokens} for tokens in work["prompts"]]
        started = time.perf_counter()
        answers = engine.generate(prompts, greedy, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(answer.outputs[0].token_ids) == work["new"] for answer in answers)
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""lm-eval's `local-completions` against the daemon: a model scores what it scores in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.clients.conftest import program, run
from tests.e2e.conftest import WORDS
from tests.e2e.daemon import GEMMA, MODELS, SMOL, Daemon

LONG = "The river. " * 150 + "Once upon a"  # several chunks of prefill
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " a city in Germany", " 12"], "answer": 0},
    {"question": "Two and two make", "choices": [" four.", " cheese and ham"], "answer": 0},
    {"question": "日本の首都は", "choices": ["東京です", "大阪です"], "answer": 0},
    {"question": LONG, "choices": [" time", " " + " ".join(WORDS[:8])], "answer": 0},
]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "target_delimiter": "",
}
SCORED = {
    "task": "facts",
    "output_type": "multiple_choice",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {
    "task": "story",
    "output_type": "generate_until",
    "doc_to_target": "nothing",
    "generation_kwargs": {"max_gen_toks": 8, "until": ["\n\n"], "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("model", [SMOL, GEMMA])
def test_local_completions(daemon: Daemon, tmp_path: Path, model: str) -> None:
    """Log-likelihoods by echo and logprobs within 1e-3 of transformers' in float32, the same greedy flags,
    and generated text to the letter."""
    samples = evaluate(daemon, tmp_path, model)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / model)
    reference = AutoModelForCausalLM.from_pretrained(MODELS / model, dtype=torch.float32).eval()
    for sample in samples["facts"]:
        wanted = [
            likelihood(reference, tokenizer, sample["doc"]["question"], choice)
            for choice in sample["doc"]["choices"]
        ]
        told = [(float(value), greedy == "True") for ((value, greedy),) in sample["resps"]]
        assert [value for value, _ in told] == pytest.approx([value for value, _ in wanted], abs=1e-3)
        assert [greedy for _, greedy in told] == [greedy for _, greedy in wanted]
    for sample in samples["story"]:
        ((text,),) = sample["resps"]
        assert text == written(reference, tokenizer, sample["doc"]["question"])


def evaluate(daemon: Daemon, directory: Path, model: str) -> dict[str, list[dict[str, object]]]:
    """Run lm-eval's command line on the two tasks; every sample that it logged, by task."""
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for task in (SCORED, WRITTEN):
        whole = {**TASK, **task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (directory / f"{task['task']}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    server = f"model={model},base_url={daemon.url}/v1/completions,num_concurrent=4,max_retries=1"
    tokens = f"tokenizer={MODELS / model},tokenizer_backend=huggingface,add_bos_token=true,max_length=2048"
    run(
        [
            *(program("others", "lm_eval"), "--model", "local-completions"),
            *("--model_args", f"{server},{tokens}", "--include_path", directory),
            *("--tasks", "facts,story", "--log_samples", "--output_path", directory / "out"),
        ],
        cwd=directory,
        HF_HOME=str(directory / "hf"),
    )
    return {
        task: [
            json.loads(line)
            for file in (directory / "out").rglob(f"samples_{task}_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in ("facts", "story")
    }


@torch.inference_mode()
def likelihood(model: torch.nn.Module, tokenizer: object, question: str, choice: str) -> tuple[float, bool]:
    """The choice's log-probability behind the question, and whether it is what greedy search would write."""
    context = tokenizer(question).input_ids  # type: ignore[operator]
    whole = tokenizer(question + choice).input_ids  # type: ignore[operator]
    scores = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
    positions = range(len(context), len(whole))
    total = sum(float(scores[at - 1, whole[at]]) for at in positions)
    return total, all(int(scores[at - 1].argmax()) == whole[at] for at in positions)


@torch.inference_mode()
def written(model: object, tokenizer: object, question: str) -> str:
    """The greedy continuation, up to where the task ends it."""
    ids = tokenizer(question, return_tensors="pt").input_ids  # type: ignore[operator]
    out = model.generate(  # type: ignore[attr-defined]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    return str(text).split("\n\n")[0].rstrip("\N{REPLACEMENT CHARACTER}")  # half a character is none here

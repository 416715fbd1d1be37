"""Time and scores of IFEval on one model with UniAPL's sampler and with lm-eval's Hugging Face backend.

    python benchmarks/ifeval_speed.py MODEL IFEVAL.jsonl [--max-completion-length 64] [--batch-size 64]

NLTK_DATA must be set to the directory with NLTK's data (punkt_tab). Both run in turn, twice each, and the
ratio compares the shorter times, because other load on the machine affects both only roughly equally.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval.tasks.ifeval
import torch

from uniapl.config import Config, DataConfig, EvaluationConfig
from uniapl.evaluation import evaluate_suite
from uniapl.evaluation.harness import find_tasks, run_lm_eval
from uniapl.evaluation.suites import load_suites
from uniapl.models.loading import ModelSource, load_model, load_stop_ids, load_tokenizer
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings

TASK = """\
include: {theirs}/ifeval.yaml
task: ifeval_local
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {data}}}}}
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {tokens}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--max-completion-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = ModelSource(base=options.model)
    tokenizer: Any = load_tokenizer(where)
    model = load_model(where).eval()
    stop_ids = load_stop_ids(where, model.config, tokenizer)
    config = Config(
        data=DataConfig(prompt_format="chat"),
        evaluation=EvaluationConfig(
            suites=(f"ifeval={options.data}",), max_completion_length=options.max_completion_length
        ),
    )
    (suite,) = load_suites(config, tokenizer, stop_ids=stop_ids)
    sampler = LocalSampler(
        model=model,
        settings=SamplingSettings(
            max_completion_length=options.max_completion_length, stop_ids=stop_ids, temperature=0.0
        ),
        pad_id=tokenizer.pad_token_id,
        max_batch_size=options.batch_size,
    )

    def ours() -> dict[str, float]:
        return evaluate_suite(suite, sampler, tokenizer, with_floors=False).metrics

    def theirs() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            task = TASK.format(
                theirs=next(iter(lm_eval.tasks.ifeval.__path__)),
                data=options.data.resolve(),
                tokens=options.max_completion_length,
            )
            (Path(folder) / "ifeval_local.yaml").write_text(task)
            tasks = ["ifeval_local"]
            found = run_lm_eval(
                model, tokenizer, tasks, find_tasks(tasks, folder), batch_size=options.batch_size
            )
            return found["ifeval_local"]

    seconds: dict[str, list[float]] = {"ours": [], "lm-eval": []}
    scores: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for name, run in (("ours", ours), ("lm-eval", theirs)):
            start = time.monotonic()
            scores[name] = run()
            seconds[name].append(time.monotonic() - start)
    shown = {key: round(scores["ours"][key], 4) for key in scores["ours"]}
    print(json.dumps({"ours": shown, "lm-eval": scores["lm-eval"]}, indent=1))
    print({name: [round(s, 1) for s in times] for name, times in seconds.items()})
    print(f"lm-eval takes {min(seconds['lm-eval']) / min(seconds['ours']):.2f} times as long")


if __name__ == "__main__":
    main()

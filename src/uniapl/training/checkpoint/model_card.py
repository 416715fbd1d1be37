"""The model card of a trained model, in the Hub's format."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from uniapl.config import Config
from uniapl.data.reading import is_hub_dataset
from uniapl.models.loading import ModelSource
from uniapl.report.adversary import AdversaryEffect

CARD = "README.md"
MEASURED = {
    "reward": "mean over the step's rollouts of training prompts",
    "pass_rate": "fraction of the step's rollouts that pass",
    "sft/nll": "negative log-likelihood of the step's demonstrations, in nats per token",
    "discriminator/win_rate": "mean probability that a rollout is more expert-like than the demonstration",
    "completions/mean_length": "mean length of the step's rollouts, in tokens",
    "kl": "mean KL to the reference of the step's rollouts, in nats per token",
}
"""Metrics of the training step that the card shows, and what they measure."""
PLACE = '"PATH"'
"""What the loading code has in place of the model's directory or repository."""
LOADING = {
    "transformers": f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({PLACE})
tokenizer = AutoTokenizer.from_pretrained({PLACE})
""",
    "peft": f"""\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({PLACE})
tokenizer = AutoTokenizer.from_pretrained({PLACE})
""",
}
"""Library -> the code that loads the model."""


def model_card(
    config: Config,
    source: ModelSource,
    methods: list[str],
    steps: int,
    last: Mapping[str, Any],
    adversary: AdversaryEffect,
    suites: Mapping[str, int] | None = None,
) -> str:
    """The README.md of a trained model.

    Args:
        methods: Methods of the stages that were run.
        steps: Steps over all stages up to these weights.
        last: Metrics of the last of these steps.
        adversary: What the adversary did in these steps.
        suites: Suite -> its number of prompts.
    """
    rank = config.model.lora_r
    # An adapter that continues another adapter has the same base.
    base = source.base if rank else str(config.model.model_name_or_path)
    # The Hub cannot link to a local path.
    on_the_hub = not Path(base).exists()
    name = base if on_the_hub else Path(base).name
    paths = (config.data.path,) if isinstance(config.data.path, str) else config.data.path or ()
    library = "peft" if rank else "transformers"
    front = {
        "base_model": base if on_the_hub else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys(["uniapl", *methods]), *(["lora"] if rank else [])],
        "datasets": [path for path in paths if is_hub_dataset(path)],
    }
    front = {key: value for key, value in front.items() if value}
    data = ", ".join(p if is_hub_dataset(p) else Path(p).name for p in paths) or "given in Python"
    # The directory of the user's file is not published.
    rewards = [function.name.rpartition("/")[2] for function in config.rewards.functions]
    results = _results(config, last, suites or {})
    if results:
        results = [
            f"## Results after step {steps}\n\n| metric | value | measured |\n|---|---|---|",
            *results,
            "",
        ]
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {name}, trained by UniAPL\n",
            f"Trained by [UniAPL](https://arxiv.org/abs/2509.25148) {version('uniapl')}: "
            f"{' -> '.join(methods)}, {steps} steps, seed {config.seed}.\n",
            *([f"A LoRA adapter of rank {rank}; it needs {name} and peft.\n"] if rank else []),
            f"- demonstrations and prompts: {data}",
            f"- rewards: {', '.join(rewards) or 'not named in the recipe'}",
            f"- learning rate {config.optim.learning_rate:g}, {config.rollout.num_generations} rollouts per "
            f"prompt, up to {config.rollout.max_completion_length} tokens each",
            *([f"- {adversary.sentence}"] if adversary.sentence else []),
            "",
            *results,
            f"## Load the model\n\n```python\n{LOADING[library]}```\n",
        ]
    )


def merged_card(card: str) -> str:
    """The card of an adapter's run, for the model with the adapter merged."""
    for old, new in (
        ("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n"),
        (LOADING["peft"], LOADING["transformers"]),
    ):
        card = card.replace(old, new, 1)
    return re.sub(
        r"\nA LoRA adapter of rank (\d+); it needs (.+) and peft\.\n",
        r"\nA LoRA adapter of rank \1 was trained and merged into \2.\n",
        card,
        count=1,
    )


def _results(config: Config, last: Mapping[str, Any], suites: Mapping[str, int]) -> list[str]:
    """Rows of the table: the evaluation after the step, then the metrics of the step itself."""
    evaluation = config.evaluation
    found: dict[str, str] = {}
    for key in last:
        kind, _, name = key.partition("/")
        if kind != "eval" or name.endswith("/unscored") or "/tools/" in name:
            continue
        suite = name.partition("/")[0]
        found[key] = "evaluation after the step"
        if suite in suites:
            samples = f"completions per prompt: {evaluation.num_samples}"
            how = f"temperature {evaluation.sampling_temperature:g}"
            found[key] = f"{suites[suite]:,} prompts of '{suite}'; {samples}; {how}"
    return [
        f"| {key} | {last[key]:.4g} | {measured} |"
        for key, measured in (found | MEASURED).items()
        # The user's function may return values of other types.
        if isinstance(last.get(key), (int, float))
    ]

"""The model card of a trained model, in the Hub's format."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from uniapl.config import Config
from uniapl.models.loading import ModelSource
from uniapl.report.adversary import AdversaryEffect

SHOWN = ("reward", "pass_rate", "sft/nll", "discriminator/win_rate", "completions/mean_length", "kl")
"""Metrics of the last step that the card shows."""


def model_card(
    config: Config,
    source: ModelSource,
    methods: list[str],
    steps: int,
    last: Mapping[str, Any],
    adversary: AdversaryEffect,
) -> str:
    """The README.md of a trained model.

    Args:
        methods: Methods of the stages that were run.
        steps: Steps over all stages up to these weights.
        last: Metrics of the last of these steps.
        adversary: What the adversary did in these steps.
    """
    rank = config.model.lora_r
    # An adapter that continues another adapter has the same base.
    base = source.base if rank else str(config.model.model_name_or_path)
    tags = [*dict.fromkeys(["uniapl", *methods]), *(["lora"] if rank else [])]
    front: dict[str, Any] = {"library_name": "peft" if rank else "transformers", "tags": tags}
    # The Hub cannot link to a local path.
    on_the_hub = not Path(base).exists()
    if on_the_hub:
        front["base_model"] = base
    name = base if on_the_hub else Path(base).name
    numbers = [f"| {key} | {last[key]:.4g} |" for key in SHOWN if last.get(key) is not None]
    paths = (config.data.path,) if isinstance(config.data.path, str) else config.data.path or ()
    data = ", ".join(Path(path).name for path in paths) or "given in Python"
    rewards = ", ".join(function.name for function in config.rewards.functions) or "not named in the recipe"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {name}, trained by UniAPL\n",
            f"Trained by [UniAPL](https://arxiv.org/abs/2509.25148) {version('uniapl')}: "
            f"{' -> '.join(methods)}, {steps} steps, seed {config.seed}.\n",
            *([f"A LoRA adapter of rank {rank}; it needs {name} and peft.\n"] if rank else []),
            f"- demonstrations and prompts: {data}",
            f"- rewards: {rewards}",
            f"- learning rate {config.optim.learning_rate:g}, {config.rollout.num_generations} rollouts per "
            f"prompt, up to {config.rollout.max_completion_length} tokens each",
            *([f"- {adversary.sentence}"] if adversary.sentence else []),
            "",
            *(["| last step | |", "|---|---|", *numbers, ""] if numbers else []),
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            "```\n",
        ]
    )

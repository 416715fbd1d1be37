"""A reward that can be won by writing ever more: what the adversary with its constraint does about it."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from support.runs import lines, recipe, train
from support.tiny import letter_rows

pytestmark = pytest.mark.slow

EXPERT_LENGTH = 4
"""Three letters and the end token."""


def longer(completions: list[str]) -> list[float]:
    """Pays for length and for nothing else."""
    return [min(1.0, len(text) / 15) for text in completions]


def final_length(model_dir: Path, output: Path, method: str, **objective: Any) -> float:
    """Sixty steps of imitation, then seventy with that reward: the mean length of the last ten steps.

    At twice this learning rate the policy outruns the discriminator on some seeds: all answers of a group
    come to be equally long and equally rejected, and then no weight brings it back (docs/log.md).
    """
    values = recipe(
        model_dir,
        output,
        save_steps=1000,
        rollout={"num_generations": 8, "max_completion_length": 16},
        objective={"beta": 0.0, **objective},
        optim={"learning_rate": 3e-3, "lr_scheduler_type": "constant"},
        discriminator={
            "warmup_steps": 5,
            "learning_rate": 3e-3,
            "updates_per_step": 4,
            "replay_size": 64,
        },
        batching={"prompts_per_step": 6, "demonstrations_per_step": 26, "max_tokens_per_micro_batch": 4000},
        stages=[
            {"method": "sft", "max_steps": 60},
            {"method": method, "max_steps": 70, "optim": {"learning_rate": 5e-4}},
        ],
    )
    train(values, train_dataset=letter_rows(26, demonstrated=range(26)), reward_functions=[longer])
    records = lines(output / "metrics.jsonl")[60:]
    first, last = (
        statistics.fmean(record["completions/mean_length"] for record in part)
        for part in (records[:5], records[-10:])
    )
    assert first == pytest.approx(EXPERT_LENGTH, rel=0.1), "imitation had learnt the expert's length"
    return last


def test_the_constraint_keeps_the_expert_s_length_where_the_reward_pays_for_more(
    model_dir: Path, tmp_path: Path
) -> None:
    """Without the adversary, and with a fixed weight that is too small, the policy writes all that it may."""
    learned = {"lambda_controller": "dual", "max_expert_gap": 0.1, "lambda_learning_rate": 1.0}
    assert final_length(model_dir, tmp_path / "none", "grpo") > 3 * EXPERT_LENGTH
    assert final_length(model_dir, tmp_path / "fixed", "a-grpo", lambda_adv=2.0) > 3 * EXPERT_LENGTH
    held = final_length(model_dir, tmp_path / "held", "a-grpo", lambda_adv=2.0, **learned)
    assert held <= 1.5 * EXPERT_LENGTH

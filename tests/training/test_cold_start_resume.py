"""A cold start that is a fraction of the steps does not move when a run is continued with more steps."""

from pathlib import Path
from typing import Any

from support.runs import lines, recipe, train

COLD: dict[str, Any] = {"batching": {"cold_start_steps": 0.4}, "objective": {"reference_step": None}}


def test_more_steps_keep_the_cold_start_and_the_reference(model_dir: Path, tmp_path: Path) -> None:
    """Two of five steps; of twenty steps it would be eight, and the run is at the fifth."""
    output = tmp_path / "run"
    train(recipe(model_dir, output, max_steps=5, save_steps=5, **COLD))
    train(recipe(model_dir, output, max_steps=20, save_steps=5, resume="auto", **COLD))
    records = lines(output / "metrics.jsonl")
    assert [record["tokens/rollout"] > 0 for record in records] == [False] * 2 + [True] * 18
    assert [record.get("kl") is not None for record in records] == [False] * 2 + [True] * 18


def test_a_run_without_a_cold_start_keeps_the_initial_policy_as_reference(
    model_dir: Path, tmp_path: Path
) -> None:
    """0.4 steps are rounded to 0; of five steps it would be two, and the reference the policy of step one."""
    output = tmp_path / "run"
    train(recipe(model_dir, output, max_steps=1, save_steps=1, **COLD))
    train(recipe(model_dir, output, max_steps=5, save_steps=5, resume="auto", **COLD))
    records = lines(output / "metrics.jsonl")
    assert all(record["tokens/rollout"] > 0 for record in records)
    assert records[1]["kl"] > 1e-6, "the policy has moved away from the initial one"

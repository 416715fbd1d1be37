"""A cold start that is a fraction of the steps does not move when a run is continued with more steps."""

from pathlib import Path

from support.runs import lines, recipe, train


def test_more_steps_keep_the_cold_start_and_the_reference(model_dir: Path, tmp_path: Path) -> None:
    """Two of five steps; with twenty steps it would be eight, and the run is at the fifth."""
    output = tmp_path / "run"
    cold = {"batching": {"cold_start_steps": 0.4}, "save_steps": 5, "objective": {"reference_step": None}}
    train(recipe(model_dir, output, max_steps=5, **cold))
    train(recipe(model_dir, output, max_steps=8, resume="auto", **cold))
    train(recipe(model_dir, output, max_steps=20, resume="auto", **cold))
    records = lines(output / "metrics.jsonl")
    assert [record["tokens/rollout"] > 0 for record in records] == [False] * 2 + [True] * 18
    assert [record.get("kl") is not None for record in records] == [False] * 2 + [True] * 18

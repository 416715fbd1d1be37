"""Early stopping: the rules, and runs that resume or continue with the next stage."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from support.runs import lines, recipe, run_until, timeless, train
from uniapl.config import EarlyStoppingConfig
from uniapl.training.monitor.early_stopping import Stopping


def ends_at(values: list[float | None], tokens: int = 10, **rule: Any) -> tuple[int, str] | None:
    """The number of the last value, from 1, and the rule that ended the stage."""
    stopping = Stopping()
    for number, value in enumerate(values, start=1):
        stopping.update(
            EarlyStoppingConfig(**{"metric": "m", **rule}), {"m": value}, number * tokens, 4 * number
        )
        if stopping.reason:
            return number, stopping.reason.split(":")[0]
    return None


def test_by_hand() -> None:
    assert ends_at([0.1, 0.5, 0.4, 0.9]) is None, "no rule is on by default"
    assert ends_at([0.1, 0.5, 0.4, 0.9], max_rollouts=12) == (3, "budget")
    assert ends_at([0.1, 0.5, 0.4, 0.9], max_rollouts=13) == (4, "budget")
    assert ends_at([0.1, 0.5, 0.4, 0.9], target=0.5) == (2, "target")
    assert ends_at([0.9, 0.5, 0.4], target=0.4, greater_is_better=False) == (3, "target")
    assert ends_at([0.1, 0.5, 0.5, 0.4], patience=2) == (4, "patience")
    assert ends_at([0.1, 0.5, 0.4, 0.6, 0.5, 0.4], patience=2) == (6, "patience")
    assert ends_at([0.5, 0.4, 0.3, 0.3, 0.3], patience=2, greater_is_better=False) == (5, "patience")
    assert ends_at([0.5, None, None, float("nan"), 0.4, 0.4], patience=2) == (6, "patience")
    assert ends_at([None, None, None], max_tokens=30) == (3, "budget")
    assert ends_at([None, None, None], max_tokens=31) is None


def test_rounding_neither_misses_a_target_nor_is_an_improvement() -> None:
    below = 0.6 + 0.3 + 0.1
    assert below < 1.0
    assert ends_at([0.9, below], target=1.0) == (2, "target")
    assert ends_at([0.9, 0.1 + 0.2], target=0.3, greater_is_better=False) == (2, "target")
    assert ends_at([below, 1.0, below, 1.0], patience=2) == (3, "patience")
    assert ends_at([0.9, 0.91, 0.90001, 0.91001], patience=2) is None


def test_an_early_end_starts_the_next_stage_and_resumes(model_dir: Path, tmp_path: Path) -> None:
    """The first stage ends by patience (its metric never moves), the second one by its budget."""
    values = {
        "save_steps": 2,
        "stages": [
            {"method": "sft", "max_steps": 9, "early_stopping": {"metric": "skipped", "patience": 2}},
            {"method": "grpo", "max_steps": 9, "early_stopping": {"max_tokens": 100}},
        ],
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(recipe(model_dir, whole, **values))
    records = lines(whole / "metrics.jsonl")
    assert [record["stage"] for record in records] == [0, 0, 0, *[1] * (len(records) - 3)]
    reasons = {
        r["step"]: r["early_stopping/reason"].split(":")[0] for r in records if "early_stopping/reason" in r
    }
    assert reasons == {3: "patience", len(records): "budget"}
    learnt = list(itertools.accumulate(record["tokens/rollout"] for record in records))
    assert learnt[-2] < 100 <= learnt[-1]
    assert result.steps == len(records) < 12

    # Killed in the second stage: the first ended by patience, the second has not used its budget.
    run_until(1, recipe(model_dir, broken, **values))
    train(recipe(model_dir, broken, resume="auto", **values))
    assert timeless(lines(broken / "metrics.jsonl")) == timeless(records)


def test_patience_survives_a_resume(model_dir: Path, tmp_path: Path) -> None:
    """The metric never changes: the stage ends after four steps, in one run or in two."""
    values = {"max_steps": 9, "save_steps": 2, "early_stopping": {"metric": "skipped", "patience": 3}}
    assert train(recipe(model_dir, tmp_path / "whole", **values)).steps == 4
    run_until(2, recipe(model_dir, tmp_path / "broken", **values))
    assert train(recipe(model_dir, tmp_path / "broken", resume="auto", **values)).steps == 4


def test_an_unknown_metric_is_reported(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"max_steps": 2, "early_stopping": {"metric": "rewrad", "patience": 1}}
    assert train(recipe(model_dir, tmp_path / "run", **values)).steps == 2
    assert "warning: early_stopping.metric 'rewrad' is not a metric" in capsys.readouterr().out


def test_another_rule_continues_a_stage_that_had_ended(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(model_dir, tmp_path / "run", early_stopping={"metric": "skipped", "target": 0.0})
    assert train(values).steps == 1
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    assert train(values | {"resume": "auto", "save_total_limit": 7}).steps == 1
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written, "it says how the run was made"
    assert (
        "this run is complete (target: skipped is 0, the target 0); to continue it, set another"
        in capsys.readouterr().out
    )
    assert train(values | {"resume": "auto", "early_stopping": {}}).steps == 4

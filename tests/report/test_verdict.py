"""The verdict at the top of a report: its sentences, by hand, for runs that do and do not learn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import metric_rows, write_lines, write_run
from uniapl.config import Config
from uniapl.report.charts import curves
from uniapl.report.health_rules import RULES, unevaluated
from uniapl.report.page import render
from uniapl.report.reading import RunData, read_run
from uniapl.report.summary import results
from uniapl.report.verdict import health_of, learning, verdict, without_gradient
from uniapl.training.monitor import health

RISING = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Means 0.3 and 0.8, both variances 0.025: the error of the change is 0.1, and t is 2.306 with 8 degrees."""


def run_of(path: Path, metrics: list[dict[str, Any]], **recipe: Any) -> RunData:
    rows = [{"step": step, "stage": 0} | record for step, record in enumerate(metrics, start=1)]
    return read_run(write_run(path / "run", rows, max_steps=len(rows), **recipe))


def test_a_reward_that_rises(tmp_path: Path) -> None:
    """A cold start has no rewards; the steps that have one count."""
    run = run_of(tmp_path, [{"loss": 1.0}] * 3 + [{"reward": value} for value in RISING])
    assert learning(run) == {
        "kind": "good",
        "label": "Learning",
        "texts": [
            "The reward rose from 0.300 to 0.800 (means of the first and the last 5 of 10 steps; change "
            "+0.500, 95 % interval +0.269 to +0.731)."
        ],
    }
    assert results(run) == [{"label": "Reward", "value": "0.300 → 0.800"}]


def test_what_falls_and_what_is_noise(tmp_path: Path) -> None:
    rows = [{"reward": reward, "sft/nll": reward} for reward in reversed(RISING)]
    item = learning(run_of(tmp_path / "falls", rows))
    assert item["kind"] == "bad", "the first metric is the main one"
    assert [text[:40] for text in item["texts"]] == [
        "The reward fell from 0.800 to 0.300 (mea",
        "The nll of the demonstrations fell from ",
    ]
    item = learning(run_of(tmp_path / "traded", [{"reward": r, "sft/nll": r} for r in RISING]))
    assert item["kind"] == "warn", "the reward rises, and the demonstrations become less likely"
    noisy = [{"reward": value} for value in (0.1, 0.9, 0.1, 0.9, 0.1, 0.1, 0.9, 0.2, 0.9, 0.1)]
    item = learning(run_of(tmp_path / "noisy", noisy))
    assert item["kind"] == "open"
    assert item["texts"][0].startswith("The reward did not change significantly: from 0.420 to 0.440 (means")
    rows = [row | {"sft/nll": 2.0 - value} for row, value in zip(noisy, RISING, strict=True)]
    assert learning(run_of(tmp_path / "imitates", rows))["kind"] == "good"
    item = learning(run_of(tmp_path / "short", [{"sft/nll": 2.0}, {"sft/nll": 1.0}]))
    assert (item["kind"], item["texts"]) == (
        "open",
        [
            "The nll of the demonstrations went from 2.000 to 1.000 in 2 steps, too few to distinguish a "
            "change from noise."
        ],
    )
    item = learning(run_of(tmp_path / "unknown", [{"loss": 1.0}]))
    assert item["texts"] == ["The run has no reward, no demonstrations and no evaluation."]


def test_a_constant_reward_is_named(tmp_path: Path) -> None:
    item = learning(run_of(tmp_path, [{"reward": 0.0, "reward_std": 0.0}] * 12))
    text = "Every reward of 12 steps was 0, so the rewards did not distinguish the completions."
    assert (item["kind"], item["texts"]) == ("bad", [text])


def test_constant_reward_functions_are_named_and_drawn(tmp_path: Path) -> None:
    """One is always 0, one always 0.5; one has a mean of 0 but differs within a step."""
    parts = {"a.py:zero": (0.0, 0.0), "half": (0.5, 0.0), "mixed": (0.0, 1.0), "right": (0.2, 0.0)}
    rows = [
        {"reward": value}
        | {f"rewards/{name}/mean": mean for name, (mean, _) in parts.items()}
        | {f"rewards/{name}/std": std for name, (_, std) in parts.items()}
        | {"rewards/right/mean": value}
        for value in RISING
    ]
    run = run_of(tmp_path, rows)
    item = learning(run)
    assert item["kind"] == "warn", "the reward rises"
    assert item["texts"][1:] == [
        "The reward function zero was 0 for every completion.",
        "The reward function half was 0.5 for every completion.",
    ]
    for runs in ([run], [run, run_of(tmp_path / "other", [*rows, {"loss": 1.0}])]):
        drawn = {
            line["label"] if len(runs) == 1 else chart["title"].split(": ")[1]: line["y"]
            for chart in curves(runs)[0]["charts"]
            if chart["title"].startswith("Reward functions")
            for line in chart["lines"]
        }
        assert set(drawn) == {"zero", "half", "mixed", "right"}
        assert drawn["zero"] == [0.0] * 10


def test_steps_without_rewards_and_without_a_gradient(tmp_path: Path) -> None:
    assert without_gradient([]) is None
    reason = without_gradient([{"grad_norm": 0.0}, {"grad_norm": 1e-9}])
    assert reason is not None
    assert "see tokens/" in reason
    for applied in ({"grad_norm": 1e-3}, {"grad_norm": None}, {"grad_norm": float("nan")}):
        assert without_gradient([{"grad_norm": 0.0}, applied]) is None
    rows = [{"step": 0, "eval/right": 0.5}] + [
        {"step": step, "reward": 0.25, "grad_norm": 0.0, "frac_reward_zero_std": 1.0} for step in (1, 2)
    ]
    item = learning(read_run(write_run(tmp_path / "run", rows)))
    assert item["kind"] == "bad"
    assert item["texts"][0].startswith(
        "No step had a gradient, so the model has not learned anything: all completions of a prompt had the "
        "same reward in every step (mean 0.250)."
    )


def test_the_end_and_the_health_of_a_run(tmp_path: Path) -> None:
    rows = [{"reward": 0.5, "skipped": int(step == 2)} for step in range(1, 13)]
    for step in (3, 4, 6):
        rows[step - 1]["health/divergence"] = 1
    rows[4]["health/kl_jump"] = 1
    path = run_of(tmp_path, rows).directory
    write_lines(path / "health.jsonl", [{"step": 3, "rule": "divergence", "message": "Lower lambda."}])
    assert health_of(read_run(path)) == {
        "kind": "warn",
        "label": "Health",
        "texts": [
            "2 rules warned: divergence (in 3 steps, first in step 3), kl_jump (in 1 step, first in step 5).",
            "1 update was not applied.",
        ],
    }
    (path / "ending.json").write_text(json.dumps({"state": "stopped", "message": "it broke"}))
    stopped = read_run(path)
    end, _, healthy, *_ = verdict(stopped)
    assert (end["kind"], healthy["kind"]) == ("bad", "bad")
    assert end["texts"] == ["Stopped by a health rule, step 12 of 12.", "It broke"]
    assert "Lower lambda." in render([stopped])


def test_a_healthy_run_has_no_section_of_warnings(tmp_path: Path) -> None:
    run = run_of(tmp_path / "well", metric_rows(40))
    assert health_of(run) == {
        "kind": "good",
        "label": "Health",
        "texts": ["No rule warned, and every update was applied."],
    }
    assert "#health" not in render([run])


def test_rules_that_had_too_few_steps(tmp_path: Path) -> None:
    """A window of 5 steps. After a cold start of 4, some rules lack values in it."""
    cold, sampled = {"sft/nll": 1.0}, {"reward": 0.5, "completions/mean_length": 3.0, "kl": 0.1}

    def missing(cold_steps: int, steps: int, **changes: Any) -> tuple[list[str], bool]:
        rows = [cold] * cold_steps + [sampled] * steps
        path = tmp_path / f"{cold_steps}-{steps}-{len(changes)}"
        return unevaluated(run_of(path, rows, method="grpo", health={"window": 5}, **changes))

    assert missing(0, 4) == (["constant_rewards", "kl_jump", "length_explosion"], True)
    assert missing(0, 5) == (["length_explosion"], False)
    assert missing(0, 9) == (["length_explosion"], False)
    assert missing(0, 10) == ([], False)
    assert missing(4, 4) == (["constant_rewards", "length_explosion"], False)
    assert missing(4, 5) == (["length_explosion"], False)
    assert missing(5, 5) == (["length_explosion"], False), "the first of two windows has no value"
    assert missing(4, 6) == ([], False), "the first of two windows has a value"
    item = health_of(run_of(tmp_path, [sampled] * 9, method="grpo", health={"window": 5}))
    assert item["texts"] == [
        "No rule warned, and every update was applied.",
        "Not evaluated, because the run is too short: length_explosion.",
    ]
    item = health_of(run_of(tmp_path / "short", [sampled] * 4, method="grpo", health={"window": 5}))
    text = "The run is too short for the health rules, which read 5 steps (health.window)."
    assert (item["kind"], item["texts"]) == ("open", [text])


def test_rules_of_stages(tmp_path: Path) -> None:
    """The windows of a rule are steps of one stage; a rule that fired was evaluated."""
    stages = [{"method": "grpo", "max_steps": 6}, {"method": "grpo", "max_steps": 6}]
    rows = [{"stage": int(step >= 6), "completions/mean_length": 3.0} for step in range(12)]
    run = run_of(tmp_path, rows, stages=stages, health={"window": 5})
    assert unevaluated(run) == (["length_explosion"], True)
    rows[0]["health/length_explosion"] = 1
    assert unevaluated(run_of(tmp_path / "fired", rows, stages=stages, health={"window": 5})) == ([], False)


def test_rules_that_do_not_apply_are_not_named(tmp_path: Path) -> None:
    values = {"pass_rate": 0.0, "discriminator/accuracy": 0.5, "weight/mu": 0.0}
    names, _ = unevaluated(run_of(tmp_path / "grpo", [values], method="grpo"))
    assert names == ["discriminator_saturated"]
    names, _ = unevaluated(
        run_of(tmp_path / "all", [values], method="uniapl", discriminator={"kind": "bradley-terry"})
    )
    assert names == [
        "nothing_passes",
        "discriminator_dead",
        "discriminator_saturated",
        "no_supervised_tokens",
    ]


def test_the_rules_are_those_of_training() -> None:
    """A new rule needs an entry, and a rule that compares two windows does not fire in one."""
    stage = Config.model_validate(
        {
            "health": {"window": 5},
            "objective": {"lambda_bounds": (0.1, 8.0)},
            "discriminator": {"kind": "bradley-terry"},
        }
    )
    first, last = {}, {}
    for metric, before, after in (
        ("completions/mean_length", 10.0, 30.0),
        ("completions/length_ratio", 1.0, 0.1),
        ("discriminator/accuracy", 0.5, 0.5),
        ("completions/length_auc", 0.9, 0.9),
        ("discriminator/win_rate", 0.4, 0.7),
        ("reward", 0.9, 0.1),
        ("constraint/multiplier", 8.0, 8.0),
    ):
        first[metric], last[metric] = before, after
    noise = [
        dict.fromkeys(("reward", "completions/length_ratio"), 0.001 * sign) for sign in (1, -1, 0, 2, -2)
    ]

    def window(values: dict[str, float]) -> list[dict[str, float]]:
        return [values | {key: values[key] + n for key, n in one.items()} for one in noise]

    assert set(health.evaluate_rules(window(last), stage, stage_step=100)) == set(RULES)
    two = {name for name, rule in RULES.items() if rule.windows == 2}
    assert set(health.warnings(window(first) + window(last), stage, stage_step=100)) == two
    assert not set(health.warnings(window(last), stage, stage_step=100)) & two


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_the_page_begins_with_the_verdict(tmp_path: Path, state: str) -> None:
    rows = [{"step": step} | row for step, row in enumerate(metric_rows(20), start=1)]
    path = write_run(tmp_path / "run", rows, end_state={"state": state, "message": "Go on."}, max_steps=20)
    page = render([read_run(path)])
    labels = re.findall(r'<div class="(\w+)"><dt>.*?</span> (\w+)</dt>', page)
    assert labels[0] == ("good" if state == "finished" else "open", "End")
    assert [label for _, label in labels] == ["End", "Learning", "Health"]
    assert page.index("Go on.") < page.index('id="curves"')

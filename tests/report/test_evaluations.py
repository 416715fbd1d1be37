"""The tables before and after training: evaluations by hand, and the measurements of the demo."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import metric_rows, write_run
from uniapl.errors import UsageError
from uniapl.report.evaluations import evaluation_sentence, main_scores, tables
from uniapl.report.page import render
from uniapl.report.reading import RunData, read_run
from uniapl.report.verdict import learning

SUITE = {
    "eval/held_out/good": 0.25,
    "eval/held_out/reward": 0.5,
    "eval/held_out/mean_length": 20.5,
    "eval/held_out/unscored": 0.0,
    "eval/ifeval/reward": 0.0,
    "eval/ifeval/prompt_strict": 0.125,
    "eval/ifeval/truncated": 0.5,
}
EVALUATION = {"evaluation": {"metrics": ["uniapl.demo.metrics:good"]}}


def run_of(path: Path, evaluated: dict[int, dict[str, float]], steps: int = 10, **recipe: Any) -> RunData:
    """A run whose reward rises, with evaluations at some steps; step 0 is before training."""
    rows = [{"step": 0, "stage": 0}] if 0 in evaluated else []
    rows += metric_rows(steps)
    rows = [row | evaluated.get(row["step"], {}) for row in rows]
    return read_run(write_run(path / "run", rows, **recipe))


def test_the_base_model_and_the_last_step(tmp_path: Path) -> None:
    last = SUITE | {"eval/held_out/good": 0.75, "eval/held_out/mean_length": 18.0}
    run = run_of(tmp_path, {0: SUITE, 5: SUITE, 10: last}, **EVALUATION)
    assert main_scores(run) == ["eval/held_out/good", "eval/ifeval/prompt_strict"]
    (table,) = tables(run)
    assert table["header"] == ["base", "step 10", "difference"]
    assert [(row["name"], row["values"]) for row in table["rows"]] == [
        ("held_out/good", ["0.250", "0.750", "+0.500"]),
        ("held_out/reward", ["0.500", "0.500", "+0.000"]),
        ("held_out/mean_length", ["20.500", "18.000", "-2.500"]),
        ("ifeval/reward", ["0.000", "0.000", "+0.000"]),
        ("ifeval/prompt_strict", ["0.125", "0.125", "+0.000"]),
        ("ifeval/truncated", ["0.500", "0.500", "+0.000"]),
    ]
    assert table["note"] == ""
    text = (
        "Evaluation from the base model to step 10: held_out/good 0.250 → 0.750, "
        "ifeval/prompt_strict 0.125 → 0.125."
    )
    assert evaluation_sentence(run) == (text, False)
    assert learning(run)["texts"][-1] == text
    page = render([run])
    assert page.index("<caption>Evaluation</caption>") < page.index('id="curves"')


def test_a_score_that_fell_is_a_warning(tmp_path: Path) -> None:
    run = run_of(tmp_path / "fell", {0: {"eval/mine": 0.5}, 10: {"eval/mine": 0.4}})
    assert evaluation_sentence(run) == (
        "Evaluation from the base model to step 10: mine 0.500 → 0.400.",
        True,
    )
    assert learning(run)["kind"] == "warn", "the reward rose"
    two = {0: {"eval/a": 0.5, "eval/b": 0.5}, 10: {"eval/a": 0.4, "eval/b": 0.6}}
    assert learning(run_of(tmp_path / "one", two))["kind"] == "warn"
    assert (
        learning(run_of(tmp_path / "rose", {0: {"eval/mine": 0.5}, 10: {"eval/mine": 0.6}}))["kind"] == "good"
    )


def test_the_best_checkpoint_is_the_result(tmp_path: Path) -> None:
    scores = {0: 0.1, 5: 0.9, 10: 0.3}
    path = run_of(tmp_path, {step: {"eval/mine": score} for step, score in scores.items()}).directory
    (path / "best.json").write_text(json.dumps({"step": 5}))
    (table,) = tables(read_run(path))
    assert table["header"] == ["base", "step 5, best", "difference"]
    assert table["rows"][0]["values"] == ["0.100", "0.900", "+0.800"]


def test_one_evaluation_and_a_first_one_during_training(tmp_path: Path) -> None:
    run = run_of(tmp_path / "one", {10: SUITE})
    (table,) = tables(run)
    assert (table["header"], table["rows"][0]["values"]) == (["step 10"], ["0.250"])
    assert evaluation_sentence(run) == (
        "Evaluation at step 10: held_out/reward 0.500, ifeval/prompt_strict 0.125.",
        False,
    )
    (table,) = tables(run_of(tmp_path / "two", {4: SUITE, 8: SUITE}))
    assert table["header"] == ["step 4", "step 8", "difference"]
    assert table["note"] == "With eval_on_start: true, the table has the base model too."
    found = tables(run_of(tmp_path / "own", {0: {"eval/a": 1.0}, 10: {"eval/a": 2.0, "eval/b": 1.0}}))
    assert [table["header"] for table in found] == [["base", "step 10", "difference"], ["step 10"]]
    assert tables(run_of(tmp_path / "none", {})) == []


def test_many_scores_are_only_in_the_table(tmp_path: Path) -> None:
    scores = {f"eval/s{number}": 1.0 for number in range(6)}
    run = run_of(tmp_path, {10: scores})
    text = "Evaluation at step 10: s0 1.000, s1 1.000, s2 1.000, s3 1.000; the table has 2 more."
    assert evaluation_sentence(run) == (text, False)
    assert len(tables(run)[0]["rows"]) == 6


def test_the_measurements_of_the_demo(tmp_path: Path) -> None:
    path = run_of(tmp_path, {}).directory
    row = {"name": "good", "meaning": "is <fluent>", "values": ["0.20", "0.68"]}
    found = {"title": "256 prompts", "models": ["base", "uniapl"], "rows": [row]}
    (path / "measurements.json").write_text(json.dumps(found))
    run = read_run(path)
    assert tables(run) == [{"title": "256 prompts", "header": ["base", "uniapl"], "rows": [row], "note": ""}]
    page = render([run])
    assert "<small>is &lt;fluent&gt;</small>" in page
    assert '<td class="number">0.68</td>' in page
    (path / "measurements.json").write_text('{"title": "x", "models": []}')
    with pytest.raises(UsageError, match=r"cannot read '.*measurements\.json': it has no 'rows'; delete"):
        read_run(path)

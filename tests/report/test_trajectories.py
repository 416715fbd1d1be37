"""Completions that call tools in the report: their turns, masks, outcomes and counts, by hand."""

from pathlib import Path
from typing import Any

import pytest

from support.report_runs import alternating, answer, calling, metric_rows, prompt_row, trajectory, write_run
from uniapl.cli.report import report
from uniapl.errors import UsageError
from uniapl.report.charts import curves
from uniapl.report.completions import as_columns, packed_completions
from uniapl.report.distributions import distributions
from uniapl.report.reading import read_run
from uniapl.report.trajectories import MAX_CHARACTERS, tool_counts, turns


def result(name: str) -> dict[str, Any]:
    return {"role": "tool", "name": name, "content": "3"}


DONE = {"role": "assistant", "content": "3"}


def states(completion: dict[str, Any]) -> list[list[str]]:
    """The states of the calls of each written part."""
    found = turns(completion)
    assert found is not None
    return [[state for _, _, state in part["calls"]] for part in found if "given" not in part]


def test_the_turns_of_a_trajectory() -> None:
    """Calls 1 and 2 of three fail; the results of the first turn are one given part."""
    one = trajectory(
        [calling("add", "sub", a=1), result("add"), result("sub"), calling("mul"), result("mul"), DONE],
        ["<think>\nhm\n</think>\ncall", "<r>3</r><r>3</r>", "again", "<r>3</r>", "3<|im_end|>"],
        {"calls": 3, "failures": [1, 2]},
    )
    written = {"thought": "", "calls": [], "malformed": False}
    assert turns(one) == [
        written
        | {"thought": "<think>\nhm\n</think>", "text": "\ncall"}
        | {"calls": [["add", '{"a": 1}', "answered"], ["sub", '{"a": 1}', "failed"]]},
        {"given": "<r>3</r><r>3</r>", "title": "add, sub"},
        written | {"text": "again", "calls": [["mul", "{}", "failed"]]},
        {"given": "<r>3</r>", "title": "mul"},
        written | {"text": "3<|im_end|>"},
    ]
    assert tool_counts(one) == [3, 2, 0, 0]


def test_calls_without_a_result() -> None:
    """After the last iteration; executed without room for the result; failed without room; malformed."""
    begun = [calling("add"), result("add")]
    segments = ["call", "3", "call call"]
    last = trajectory([*begun, calling("add", "add")], segments, {"calls": 1, "unanswered": 2})
    assert states(last) == [["answered"], ["unanswered", "unanswered"]]
    assert tool_counts(last) == [1, 0, 0, 2]
    cut = trajectory([*begun, calling("add", "sub")], segments, {"calls": 3, "failures": [2]})
    assert states(cut) == [["answered"], ["unread", "failed"]]
    odd = trajectory([*begun, DONE], segments, {"calls": 1, "malformed": 1})
    found = turns(odd)
    assert found is not None
    assert [part.get("malformed") for part in found] == [False, None, True]
    assert tool_counts(odd) == [1, 0, 1, 0]


def test_columns_of_a_run_with_tools() -> None:
    """A demonstration with tools is shown in parts; one without, of the same run, is text."""
    one = trajectory([calling("add"), result("add"), DONE], ["call", "3", "three"], {"calls": 1})
    shown = {"demonstration_segments": alternating(["a", "b", "c"])}
    found = as_columns(
        [prompt_row(1, [one, answer("plain")], **shown), prompt_row(1, [one], prompt="And that?")]
    )
    assert found["text"] == ["", "plain", ""], "the turns have the text"
    assert [len(one or ()) for one in found["turns"]] == [3, 0, 3]
    assert found["tools"] == [[1, 0, 0, 0], None, [1, 0, 0, 0]]
    expert, plain = found["expert_turns"]
    assert [part.get("text", part.get("given")) for part in expert] == ["a", "b", "c"]
    assert ["given" in part for part in expert] == [False, True, False]
    assert plain is None
    assert found["experts"] == ["It is.", "It is."]


def test_a_run_without_tools_has_no_column_and_no_chart_of_them(tmp_path: Path) -> None:
    rows = [prompt_row(1, [answer("yes"), answer("no")])]
    assert [*as_columns(rows)] == [
        *("prompts", "experts", "functions", "parts", "step", "group", "replaced", "prompt"),
        *("text", "tokens", "finish", "reward", "advantage", "win"),
    ]
    run = read_run(write_run(tmp_path / "run", metric_rows(3), rows))
    assert "Tools" not in [theme["title"] for theme in curves([run])]


def test_the_charts_of_a_run_with_tools(tmp_path: Path) -> None:
    """All four, also those that are 0 throughout."""
    names = ("call_frequency", "failure_frequency", "malformed", "unanswered")
    values = [(0.5, 0.25, 0.0, 0.0), (1.5, 0.75, 0.0, 0.0)]
    rows = [
        row | {f"tools/{name}": value for name, value in zip(names, step, strict=True)}
        for row, step in zip(metric_rows(2), values, strict=True)
    ]
    themes = curves([read_run(write_run(tmp_path / "run", rows))])
    (tools,) = (theme["charts"] for theme in themes if theme["title"] == "Tools")
    assert [chart["lines"][0]["y"] for chart in tools] == [[0.5, 1.5], [0.25, 0.75], [0.0, 0.0], [0.0, 0.0]]
    assert all(chart["note"] for chart in tools)


def test_long_results_are_cut_with_a_note() -> None:
    """The page of a run whose tools return 1 MB stays small; other text is as it was."""
    many = [calling("read", path="x" * 10), result("read"), DONE]
    long = trajectory(many, ["c" * 30_000, "r" * 1_000_000, "three"], {"calls": 1})
    found = turns(long)
    assert found is not None
    assert found[0]["text"] == "c" * 30_000
    note = "… (980,000 more characters in completions.jsonl)"
    assert found[1]["given"] == "r" * MAX_CHARACTERS + note
    exact = trajectory(many, ["c", "r" * MAX_CHARACTERS, "three"], {"calls": 1})
    assert (turns(exact) or [])[1]["given"] == "r" * MAX_CHARACTERS
    rows = [prompt_row(step, [long] * 4) for step in range(1, 6)]
    packed, shown, total = packed_completions(rows)
    assert (shown, total) == (20, 20)
    assert len(packed) < 100_000


def test_diversity_is_that_of_the_written_text(tmp_path: Path) -> None:
    """Two completions differ in the result of a tool only: one of two is distinct, and 2 of 4 words."""
    both = [
        trajectory([calling("add"), result("add"), DONE], ["call ", given, " three"], {"calls": 1})
        for given in ("one two", "four five")
    ]
    run = read_run(write_run(tmp_path / "run", metric_rows(1), [prompt_row(1, both)]))
    (chart,) = (c for c in distributions(run)["charts"] if c["title"].startswith("Diversity"))
    lines = {line["label"]: line["y"] for line in chart["lines"]}
    assert lines["distinct completions of a prompt"] == [0.5]
    assert lines["distinct-1"] == [0.5]


def test_model_analysis_refuses_trajectories(tmp_path: Path) -> None:
    one = trajectory([calling("add"), result("add"), DONE], ["call", "3", "three"], {"calls": 1})
    path = write_run(tmp_path / "run", metric_rows(1), [prompt_row(1, [one])])
    (path / "final").mkdir()
    with pytest.raises(UsageError, match="does not score completions with results of tools; leave it out"):
        report([str(path), "--model-analysis"])

"""`uniapl report`: its computations against slow references, and its page for runs of every kind."""

import base64
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.compared import MADE_UP, results_of
from support.report_runs import answer, large_run, metric_rows, prompt_row, write_lines, write_run
from support.runs import has_letter, recipe, train
from support.tiny import save_model
from uniapl.cli import run as run_cli
from uniapl.cli.report import report
from uniapl.errors import HealthStop, Interrupted, UsageError
from uniapl.report import analysis, charts, summary, write_report
from uniapl.report.completions import as_columns, packed_completions
from uniapl.report.distributions import distributions
from uniapl.report.page import render
from uniapl.report.reading import read_run

ROOT = Path(__file__).parents[2]
SAMPLES = st.lists(st.integers(0, 12).map(lambda n: n / 2), min_size=1, max_size=12)


def unpacked(page: str, name: str) -> Any:
    """The data in a script element of a page."""
    found = re.search(rf'<script id="{name}" type="text/plain">([^<]*)</script>', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def chart_titles(page: str) -> list[str]:
    return [chart["title"] for theme in unpacked(page, "data")["themes"] for chart in theme["charts"]]


def fraction_below(values: Sequence[float], bound: float) -> float:
    return sum(value <= bound for value in values) / len(values)


@given(SAMPLES, SAMPLES)
def test_wasserstein_is_the_mean_distance_of_sorted_copies(a: list[float], b: list[float]) -> None:
    """Copies make both samples equally long; then the best transport pairs them in their order."""
    first, second = sorted(a * len(b)), sorted(b * len(a))
    slow = sum(abs(x - y) for x, y in zip(first, second, strict=True)) / len(first)
    assert analysis.wasserstein(a, b) == pytest.approx(slow)


@given(SAMPLES, SAMPLES)
def test_kolmogorov_smirnov_is_the_largest_gap(a: list[float], b: list[float]) -> None:
    grid = [bound / 4 for bound in range(-4, 60)]
    slow = max(abs(fraction_below(a, bound) - fraction_below(b, bound)) for bound in grid)
    assert analysis.kolmogorov_smirnov(a, b) == pytest.approx(slow)


def test_distances_by_hand() -> None:
    assert analysis.wasserstein([0.0, 1.0], [2.0, 5.0]) == 3.0
    assert analysis.kolmogorov_smirnov([0.0, 1.0], [2.0, 5.0]) == 1.0
    assert analysis.kolmogorov_smirnov([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]) == 0.5


@given(SAMPLES, st.integers(1, 8))
def test_histogram_counts_every_value_once(values: list[float], bins: int) -> None:
    edges = analysis.bin_edges([values], bins)
    fractions = analysis.histogram(values, edges)
    assert len(fractions) == len(edges) - 1
    assert math.fsum(fractions) == pytest.approx(1.0)
    for place, fraction in enumerate(fractions[:-1]):
        inside = sum(edges[place] <= value < edges[place + 1] for value in values)
        assert fraction == pytest.approx(inside / len(values))


def test_histogram_keeps_the_largest_value_when_the_last_edge_rounds_below_it() -> None:
    values = [0.1 + 0.8805166506472687 * place / 7 for place in range(8)]
    for bins in range(1, 60):
        fractions = analysis.histogram(values, analysis.bin_edges([values], bins))
        assert math.fsum(fractions) == pytest.approx(1.0), bins


def test_histogram_by_hand() -> None:
    assert analysis.histogram([0.0, 0.5, 1.0, 2.0], [0.0, 1.0, 2.0]) == [0.5, 0.5]
    assert analysis.bin_edges([[1, 2], [9]], 3) == [1.0, 4.0, 7.0, 10.0]
    assert analysis.bin_edges([[0.0, 0.5]], 2) == [0.0, 0.25, 0.5]


def test_quantile_by_hand() -> None:
    assert analysis.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert analysis.quantile([10.0, 20.0, 30.0], 0.9) == pytest.approx(28.0)
    assert analysis.quantile([7.0], 0.9) == 7.0


def test_smoothing_by_hand() -> None:
    """Weights 1; 1/3, 2/3; then 1/7, 2/7, 4/7."""
    expected = [3.0, 5.0, None, (3 + 12 + 52) / 7]
    assert analysis.smoothed([3.0, 6.0, None, 13.0], 2 / 3) == pytest.approx(expected), "two of three values"
    assert analysis.smoothed([1.0, 5.0], 0.5) == [1.0, 5.0], "a window of one value"
    assert analysis.smoothed([1.0, 5.0], 0.0) == [1.0, 5.0]


def test_distinct_by_hand() -> None:
    """ "a b a" and "a b": five words of two kinds, three pairs of two kinds, one triple."""
    texts = ["A b a", "a b"]
    assert analysis.distinct(texts, 1) == pytest.approx(2 / 5)
    assert analysis.distinct(texts, 2) == pytest.approx(2 / 3)
    assert analysis.distinct(texts, 3) == 1.0
    assert analysis.distinct(["a"], 2) is None
    assert analysis.words("Don't, stop!") == ["don", "'", "t", ",", "stop", "!"]


def test_numbers_are_not_rounded_to_integers() -> None:
    shown = [analysis.decimal(value) for value in (0.5, 0.0, 1.0, 0.9996, 0.0004, -0.00002, 2.9999)]
    assert shown == ["0.500", "0.000", "1.000", "0.9996", "0.0004", "-0.00002", "2.9999"]
    assert analysis.decimal(99.96, 1) == "99.96"
    assert analysis.decimal(1e-9) == "0.000000"
    assert (
        analysis.interval_text({"mean": 0.1, "low": -0.0001, "high": 0.2}, "+") == "+0.100 [-0.0001, +0.200]"
    )
    assert analysis.interval_text({"mean": 0.1, "low": None, "high": None}) == "0.100", "one seed"
    assert analysis.interval_text({"mean": None, "low": None, "high": None}) == ""


def test_step_ranges_and_ends_by_hand() -> None:
    assert analysis.step_ranges([9, 3, 4, 5, 11, 12]) == "3 to 5, 9, 11 to 12"
    assert analysis.ends(list(range(25))) == ([0, 1, 2, 3, 4], [20, 21, 22, 23, 24])
    assert [len(analysis.ends(list(range(n)))[0]) for n in (9, 10, 69, 79, 80)] == [4, 5, 6, 7, 8]
    assert analysis.ends([7, 8, 9]) == ([7], [9])
    assert analysis.ends([7]) == ([7], [7])


def test_the_interval_of_a_change_by_hand() -> None:
    """[1, 3] and [4, 8]: variances 2 and 8, so the error is sqrt(10 / 2); t is 4.30265 with two degrees."""
    found = analysis.change([1.0, 3.0, 4.0, 8.0])
    half = 4.30265 * math.sqrt(5)
    expected = {"mean": 4.0, "low": 4 - half, "high": 4 + half}
    assert found == pytest.approx(expected, rel=1e-4)
    assert analysis.change([1.0, 3.0, 4.0]) == {"mean": 3.0, "low": None, "high": None}


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all loss components, as training writes it."""
    path = tmp_path_factory.mktemp("real")
    train(
        recipe(save_model(path / "model"), path / "run", objective={"lambda_adv": 1.0}, log_gradients_steps=2)
    )
    return path / "run"


def test_training_writes_the_page_of_a_run(real_run: Path) -> None:
    page = (real_run / "report.html").read_text()
    assert "Finished, step 4 of 4." in page
    titles = chart_titles(page)
    for title in ("Reward", "Win rate", "Weights", "KL to the reference", "Entropy", "Learning rate"):
        assert title in titles
    for title in (
        "Gradient norm of each component",
        "Completion length, tokens",
        "Seconds per step, by phase",
    ):
        assert title in titles
    metrics = [json.loads(line) for line in (real_run / "metrics.jsonl").read_text().splitlines()]
    (reward,) = chart(page, "Reward")["lines"]
    assert reward["x"] == [1, 2, 3, 4]
    assert reward["y"] == pytest.approx([record["reward"] for record in metrics], rel=1e-4)
    answers = unpacked(page, "completions-data")
    assert len(answers["text"]) == 4 * 3 * 4
    assert "All 48 sampled completions." in page
    assert "objective.beta" in page
    assert "0.05" in page
    source = re.search(r"<code>max_steps</code></th>.*?<td>(\w+)</td></tr>", page, re.DOTALL)
    assert source is not None
    assert source[1] == "recipe"


def chart(page: str, title: str) -> Any:
    themes = unpacked(page, "data")["themes"]
    return next(c for theme in themes for c in theme["charts"] if c["title"] == title)


def test_the_page_needs_no_network_and_runs_only_its_own_script(real_run: Path) -> None:
    page = (real_run / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!#|data:,)', page)
    assert not re.search(r"\bstyle=", page)
    # The three script elements are the script and two that hold data.
    assert page.count("<script") == 3


def test_an_sft_run_has_no_completions_and_no_discriminator(tmp_path: Path) -> None:
    train(recipe(save_model(tmp_path / "model"), tmp_path / "run", method="sft"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The nll of the demonstrations" in page
    assert 'id="completions"' not in page
    titles = chart_titles(page)
    assert "Demonstration NLL, nats per token" in titles
    assert not {"Reward", "Win rate", "Rollout groups"} & set(titles)


def test_stopped_and_interrupted_runs_have_an_end_state_and_a_page(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def broken(completions: list[str], letter: list[str]) -> list[float]:
        if (tmp_path / "stopped" / "metrics.jsonl").exists():
            raise ValueError("it broke")
        return has_letter(completions, letter)

    values = recipe(model, tmp_path / "stopped", health={"max_skipped_steps": 2})
    with pytest.raises(HealthStop):
        train(values, reward_functions=[broken])
    end_state = json.loads((tmp_path / "stopped" / "ending.json").read_text())
    assert end_state["state"] == "stopped"
    assert "it broke" in end_state["message"]
    page = (tmp_path / "stopped" / "report.html").read_text()
    assert "Stopped by a health rule, step 2 of 4." in page
    assert "it broke" in page

    def interrupting(completions: list[str], letter: list[str]) -> list[float]:
        if (tmp_path / "cut" / "metrics.jsonl").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return has_letter(completions, letter)

    values = recipe(model, tmp_path / "cut") | {"rewards": {"timeout": None}}
    with pytest.raises(Interrupted):
        train(values, reward_functions=[interrupting])
    assert "Interrupted, step 1 of 4." in (tmp_path / "cut" / "report.html").read_text()
    # A resumed run has no end state until it ends.
    interrupting.__name__ = has_letter.__name__
    train(values | {"resume": "auto"}, reward_functions=[has_letter])
    assert json.loads((tmp_path / "cut" / "ending.json").read_text())["state"] == "finished"


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(directories: Any, output: Any) -> None:
        raise ValueError("no page today")

    monkeypatch.setattr("uniapl.training.run.write_report", failing)
    result = train(recipe(save_model(tmp_path / "model"), tmp_path / "run", max_steps=1))
    assert result.final_dir.is_dir()
    assert "note: no report was written: ValueError('no page today')" in capsys.readouterr().out


def test_the_page_of_a_large_run_is_below_10_mb(tmp_path: Path) -> None:
    path = large_run(tmp_path / "run")
    write_report([path], path / "report.html")
    assert (path / "report.html").stat().st_size < 10_000_000
    answers = unpacked((path / "report.html").read_text(), "completions-data")
    assert len(answers["text"]) == 20_000
    # Each prompt is stored once.
    assert len(answers["prompts"]) == len(answers["experts"]) <= 200


def test_an_even_sample_of_too_many_completions_is_shown(tmp_path: Path) -> None:
    rows = [prompt_row(step, [answer(os.urandom(100).hex()) for _ in range(5)]) for step in range(1, 101)]
    everything, _, _ = packed_completions(rows, 1_000_000)
    budget = int(0.6 * len(everything))
    packed, shown, total = packed_completions(rows, budget)
    assert len(packed) <= budget
    assert total == 500
    assert 0 < shown < total
    steps = sorted(set(json.loads(gzip.decompress(base64.b64decode(packed)))["step"]))
    assert shown == 5 * len(steps)
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1
    assert steps[0] == 1
    assert steps[-1] >= 98
    path = write_run(tmp_path / "run", metric_rows(100), rows)
    assert f"{shown} of 500 sampled completions" in render([read_run(path)], budget=budget)


def test_a_large_completions_file_is_sampled_by_lines(tmp_path: Path) -> None:
    rows = [prompt_row(step, [answer()]) for step in range(1, 101)]
    path = write_run(tmp_path / "run", metric_rows(100), rows)
    size = (path / "completions.jsonl").stat().st_size
    run = read_run(path, max_bytes=size // 3)
    assert run.stride == 4
    assert [record["step"] for record in run.completions] == list(range(1, 101, 4))
    assert "one in 4 of its records was read" in render([run])
    assert len(read_run(path, max_bytes=size).completions) == 100


def test_data_is_escaped(tmp_path: Path) -> None:
    nasty = "</script><img src=x onerror=alert(1)>"
    metrics = [{"step": 1, "reward": 1.0, f"health/{nasty}": 1, f"eval/{nasty}/reward": 1.0, "stage": 0}]
    rows = [prompt_row(1, [answer(nasty)], prompt=nasty, demonstration=nasty)]
    path = write_run(tmp_path / "<img>", metrics, rows, end_state={"state": "stopped", "message": nasty})
    write_lines(path / "health.jsonl", [{"step": 1, "rule": nasty, "message": nasty}])
    write_report([path], path / "report.html")
    page = (path / "report.html").read_text()
    assert "<img" not in page
    assert page.count("&lt;img") >= 5
    assert unpacked(page, "completions-data")["text"] == [nasty]


def test_incomplete_last_line_and_null_values(tmp_path: Path) -> None:
    metrics = [
        {"step": 1, "reward": None, "loss": 1.0, "sft/nll": None},
        {"step": 2, "reward": 0.5, "loss": None, "sft/nll": None},
        {"step": 3, "loss": 2.0},
    ]
    rows = [prompt_row(1, [answer(reward=None, rewards={"right": None}, win_rate=None, advantage=None)])]
    path = write_run(tmp_path / "run", metrics, rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward": 0.')
    run = read_run(path)
    assert run.steps == [1, 2, 3]
    assert run.series("reward") == [None, 0.5, None]
    page = render([run])
    assert chart(page, "Reward")["lines"][0]["x"] == [2]
    assert "Demonstration NLL, nats per token" not in chart_titles(page)
    assert unpacked(page, "completions-data")["reward"] == [None]
    assert "No end recorded" in page


def test_unusable_directories_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run directory"):
        report([str(tmp_path)])
    path = write_run(tmp_path / "run", [])
    with pytest.raises(UsageError, match=r"metrics\.jsonl' has no complete step yet"):
        report([str(path)])
    (path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(UsageError, match=r"cannot read '.*metrics\.jsonl', record 2"):
        report([str(path)])
    write_lines(path / "metrics.jsonl", [{"step": 1, "reward": 1.0}])
    write_lines(path / "completions.jsonl", [{"step": 1}])
    with pytest.raises(UsageError, match=r"completions\.jsonl': record 1 has no completions"):
        report([str(path)])
    write_lines(path / "completions.jsonl", [])
    (path / "manifest.json").write_text("[")
    with pytest.raises(UsageError, match=r"cannot read '.*manifest\.json'"):
        report([str(path)])
    (path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="set -o FILE"):
        report([str(path), str(path)])
    with pytest.raises(UsageError, match="--model-analysis needs the trained model"):
        report([str(path), "--model-analysis"])
    (path / "config.yaml").write_text("max_steps: 3")
    with pytest.raises(UsageError, match="it has no method"):
        report([str(path)])
    assert run_cli(["report", str(tmp_path / "nowhere")]) == 2


def test_health_lists_steps_and_messages(tmp_path: Path) -> None:
    metrics = [{"step": step, "reward": 1.0, "skipped": int(step == 2)} for step in range(1, 7)]
    for step in (3, 4, 6):
        metrics[step - 1]["health/divergence"] = 1
    path = write_run(tmp_path / "run", metrics)
    said = {"step": 3, "rule": "divergence", "message": "Lower lambda."}
    write_lines(path / "health.jsonl", [said])
    assert summary.health(read_run(path)) == [
        {"rule": "divergence", "steps": "3 to 4, 6", "message": "Lower lambda."},
        {
            "rule": "skipped (1)",
            "steps": "2",
            "message": "The policy's update was not finite and was not applied.",
        },
    ]


def test_tiles_by_hand(tmp_path: Path) -> None:
    metrics = [
        {
            "step": step,
            "reward": step / 10,
            "sft/nll": 2.0 - step / 10,
            "completions/mean_length": 4.0,
            "num_tokens": 1000 * step,
            "step_time": 30.0,
            "time/rollout": 20.0,
            "time/update": 10.0,
        }
        for step in range(1, 11)
    ]
    rows = [
        prompt_row(step, [answer(reward=float(step == 10)), answer(reward=0.0)], demonstration_tokens=6)
        for step in range(1, 11)
    ]
    path = write_run(tmp_path / "run", metrics, rows)
    run = read_run(path)
    assert summary.results(run) == [
        {"label": "Reward", "value": "0.300 → 0.800"},
        {"label": "Demonstration NLL", "value": "1.700 → 1.200"},
    ]
    found = {tile["label"]: (tile["value"], tile["detail"]) for tile in summary.tiles(run)}
    assert found["Completions with reward 1"][0] == "0.0% → 10.0%"
    assert found["Completion length"] == ("4.0", "tokens, last steps; demonstrations 6.0")
    assert found["Tokens"][0] == "10,000"
    assert found["Time"] == ("5 min 0 s", "rollout 67%, update 33%")
    assert "Win rate" not in found


def test_a_reward_of_1_up_to_rounding_counts_as_1(tmp_path: Path) -> None:
    rounded = (0.6 + 0.3 + 0.1, 0.1 + 0.3 + 0.6, 1.0000000000000002, 0.1 + 0.2 - 0.3)
    rows = [prompt_row(step, [answer(reward=value) for value in rounded]) for step in range(1, 11)]
    path = write_run(tmp_path / "run", metric_rows(10), rows)
    found = {tile["label"]: tile["value"] for tile in summary.tiles(read_run(path))}
    assert found["Completions with reward 1"] == "75.0% → 75.0%"


def test_steps_without_completions_are_not_compared(tmp_path: Path) -> None:
    """After two steps of cold start, the first five steps with completions are 3 to 7, the last 8 to 12."""
    rows = [prompt_row(step, [answer(reward=float(step > 5))]) for step in range(3, 13)]
    path = write_run(tmp_path / "run", metric_rows(12), rows)
    found = {tile["label"]: tile["value"] for tile in summary.tiles(read_run(path))}
    assert found["Completions with reward 1"] == "40.0% → 100.0%"


def test_durations() -> None:
    said = [summary.duration(seconds) for seconds in (1.26, 59.94, 61.0, 3725.0)]
    assert said == ["1.3 s", "59.9 s", "1 min 1 s", "1 h 2 min"]


def test_lengths_are_compared_on_prompts_with_demonstrations(tmp_path: Path) -> None:
    """The first five steps have 2 tokens, the last five 4, demonstrations 5; others are left out."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 11):
        tokens = 4 if step > 5 else 2
        rows.append(prompt_row(step, [answer(tokens=tokens)] * 2, demonstration_tokens=5))
        alone = {"row": 2, "demonstration": None, "demonstration_tokens": None}
        rows.append(prompt_row(step, [answer(tokens=99)], **alone))
    found = distributions(read_run(write_run(tmp_path / "run", metric_rows(10), rows)))
    counts = {sample["label"]: (sample["count"], sample["mean"]) for sample in found["lengths"]["samples"]}
    assert counts == {
        "policy, first 5 steps": (10, 2.0),
        "policy, last 5 steps": (10, 4.0),
        "expert": (1, 5.0),
    }
    distances = {row["label"]: row["wasserstein"] for row in found["lengths"]["distances"]}
    assert distances["policy, first 5 steps and expert"] == 3.0
    assert distances["policy, last 5 steps and expert"] == 1.0
    diversity = next(c for c in found["charts"] if c["title"].startswith("Diversity"))
    lines = {line["label"]: line["y"] for line in diversity["lines"]}
    # Each step has two equal completions of one prompt, and one of the other.
    assert lines["distinct completions of a prompt"] == [0.75] * 10
    assert lines["distinct-1"] == pytest.approx([1 / 3] * 10, abs=1e-5)


def test_seeds_become_a_mean_with_an_interval(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"grpo-seed{seed}", [{"step": 1, "reward": seed}], seed=seed, method="grpo")
        for seed in (1, 2, 3)
    ]
    other = write_run(tmp_path / "sft", [{"step": 1, "reward": 7.0}], method="sft")
    (line,) = charts.curves([read_run(path) for path in paths])[0]["charts"][0]["lines"]
    half = 4.30265 / math.sqrt(3)
    assert [*line["y"], *line["low"], *line["high"]] == pytest.approx([2.0, 2 - half, 2 + half], rel=1e-4)
    output = tmp_path / "report.html"
    assert run_cli(["report", *map(str, [*paths, other]), "-o", str(output)]) == 0
    page = output.read_text()
    assert chart(page, "Reward")["note"] == charts.BANDS
    lines = chart(page, "Reward")["lines"]
    assert [(found["label"], found["y"]) for found in lines] == [("grpo (3 seeds)", [2.0]), ("sft", [7.0])]
    assert "Settings that differ between the runs" in page
    assert "objective.mu_peak" in page


def test_a_step_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    rows = [[{"step": 1, "reward": 0.0}], [{"step": 1, "reward": 2.0}, {"step": 2, "reward": 5.0}]]
    runs = [read_run(write_run(tmp_path / str(i), found, seed=i)) for i, found in enumerate(rows)]
    (line,) = charts.curves(runs)[0]["charts"][0]["lines"]
    assert line["y"] == [1.0, 5.0]
    assert line["low"] == [pytest.approx(1 - 12.7062, rel=1e-4), None]
    assert line["high"] == [pytest.approx(1 + 12.7062, rel=1e-4), None]
    charts_of = charts.curves(runs[:1])[0]["charts"][0]["lines"]
    assert "low" not in charts_of[0], "one run without a standard deviation"


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    metrics = [{"step": step, "loss": float(step % 2)} for step in range(1, 5001)]
    (line,) = charts.curves([read_run(write_run(tmp_path / "run", metrics))])[0]["charts"][0]["lines"]
    assert len(line["x"]) == math.ceil(5000 / 3)
    assert line["x"][0] == 2
    assert line["y"][:2] == pytest.approx([2 / 3, 1 / 3], rel=1e-4)


def test_stages_are_marked(tmp_path: Path) -> None:
    stages = [{"method": "sft", "max_steps": 2}, {"method": "grpo", "max_steps": 3}]
    metrics = [{"step": step, "stage": int(step > 2), "loss": 1.0} for step in range(1, 6)]
    metrics[1]["early_stopping/reason"] = "target: reached"
    page = render([read_run(write_run(tmp_path / "run", metrics, stages=stages))])
    assert unpacked(page, "data")["stages"] == [{"x": 3, "label": "grpo"}]
    assert "step 5 of 5" in page
    assert "Stage 1 ended at step 2: target: reached." in page


def test_columns_of_completions() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    found = as_columns(
        [
            prompt_row(1, [answer("a"), answer("b", rewards={"right": 0.0, "kind": 0.25})]),
            prompt_row(2, [answer("c")], prompt=chat) | {"discarded": True},
        ]
    )
    assert found["replaced"] == [0, 0, 1]
    assert found["prompts"] == ["Is it so?", "system: Be brief.\n\nuser: Why?"]
    assert found["experts"] == ["It is.", "It is."]
    assert (found["prompt"], found["group"], found["step"]) == ([0, 0, 1], [0, 0, 1], [1, 1, 2])
    assert found["functions"] == ["right", "kind"]
    assert found["parts"] == [[1.0, 0.0, 1.0], [None, 0.25, None]]


def test_model_analysis_scores_demonstrations_and_completions(real_run: Path) -> None:
    """The base equals its own log-softmax, and the trained model differs from it."""
    assert run_cli(["report", str(real_run), "--model-analysis"]) == 0
    found = json.loads((real_run / "analysis.json").read_text())
    for kind in ("expert", "policy"):
        answers = found["answers"][kind]
        assert answers["count"] == len(answers["base"]["means"]) == len(answers["final"]["means"]) > 0
        assert answers["base"]["means"] != answers["final"]["means"]
    first = found["answers"]["expert"]["base"]["means"][0]
    assert first == pytest.approx(mean_logprob(found["base"], real_run), rel=1e-3)
    page = (real_run / "report.html").read_text()
    titles = [c["title"] for c in unpacked(page, "data")["analyses"]]
    assert "Log-probability of demonstrations" in titles
    assert "Log-probability by position in completions" in titles


def mean_logprob(model: str, run: Path) -> float:
    """Nats per token of the first demonstration among the run's completions, its end token included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    record = next(r for r in records if r["demonstration"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer(record["prompt"]).input_ids
    answer_ids = [*tokenizer(record["demonstration"]).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([[*prompt, *answer_ids]])).logits[0]
    spoken = [
        math.log(float(torch.softmax(logits[len(prompt) + i - 1].double(), -1)[token]))
        for i, token in enumerate(answer_ids)
    ]
    return sum(spoken) / len(spoken)


def test_figures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [prompt_row(step, [answer(), answer("no")]) for step in range(1, 6)]
    path = write_run(tmp_path / "run", metric_rows(5), rows)
    assert run_cli(["report", str(path), "--figures", str(tmp_path / "figures")]) == 0
    written = {file.name for file in (tmp_path / "figures").iterdir()}
    for name in ("reward", "win-rate", "seconds-per-step-by-phase", "completion-lengths"):
        assert {f"{name}.png", f"{name}.svg"} <= written
    assert (tmp_path / "figures" / "reward.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_run(tmp_path / "run", metric_rows(2))
    with pytest.raises(UsageError, match=r"pip install 'uniapl\[report\]'"):
        report([str(path), "--figures", str(tmp_path / "figures")])


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    results = results_of(**MADE_UP)
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "results.json").write_text(json.dumps(results))
    output = tmp_path / "report.html"
    assert run_cli(["report", str(tmp_path / "compared"), "-o", str(output)]) == 0
    page = output.read_text()
    assert "0.420 [0.370, 0.470]" in page
    points = chart(page, "reward and expert nll")
    assert [line["label"] for line in points["lines"]] == list(results["methods"])
    assert points["lines"][1] | {"x": [1.2], "y": [0.42], "names": ["sft"]} == points["lines"][1]
    assert "further left is closer" in points["note"]
    (tmp_path / "other").mkdir()
    for text in ("{}", '{"format": 2}', "[]"):
        (tmp_path / "other" / "results.json").write_text(text)
        with pytest.raises(UsageError, match="was not written by uniapl compare"):
            report([str(tmp_path / "other")])


def test_reports_do_not_import_torch() -> None:
    """The command is imported without torch, which would take longer than writing a page."""

    code = "import sys, uniapl.cli.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""`uniapl compare` on the recipe of a tiny model: from the recipe to the page, killed and continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.runs import recipe
from support.tiny import letter_rows
from uniapl import cli
from uniapl.cli.compare import compare
from uniapl.compare.cell import Job, costs, first_warnings, flops_per_token, run_cell
from uniapl.compare.plan import parse_methods
from uniapl.compare.prepare import Prepared, prepare
from uniapl.config.resolve import resolve
from uniapl.errors import UsageError

METRIC = """
def has_letter(completions, letter):
    return [float(one in text) for text, one in zip(completions, letter)]

def length(completions):
    return [float(len(text)) for text in completions]
"""


def write(folder: Path, model_dir: Path, **changes: Any) -> Path:
    """A recipe of the user: 30 training rows and 6 held-out rows, which have completions, and a metric."""
    train, held_out, metric = folder / "train.jsonl", folder / "held_out.jsonl", folder / "metric.py"
    train.write_text("".join(f"{json.dumps(row)}\n" for row in letter_rows(26)))
    rows = [{"prompt": f"tell {x}.", "letter": x, "completion": x * 3} for x in "abcdef"]
    held_out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metric.write_text(METRIC)
    values = recipe(
        model_dir,
        folder / "run",
        method="uniapl",
        max_steps=4,
        eval_steps=2,
        data={"path": str(train)},
        rewards={"functions": ["lowercase"]},
        evaluation={
            "suites": [str(held_out)],
            "metrics": [f"{metric}:has_letter", f"{metric}:length"],
            "max_completion_length": 6,
        },
        batching={"cold_start_steps": 2, "prompts_per_step": 2, "demonstrations_per_step": 4},
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def arguments(path: Path, *words: str) -> list[str]:
    output = ["--output-dir", str(path.parent / "compared")]
    return [
        str(path),
        "--methods",
        "sft,uniapl",
        "--seeds",
        "2",
        "--threads",
        "1",
        "--keep-models",
        *output,
        *words,
    ]


def cells(path: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in (path.parent / "compared" / "cells").glob("*.json")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A comparison that is killed after its first cells, and continued."""
    path = write(tmp_path_factory.mktemp("compared"), model_dir)
    two = arguments(path, "--jobs", "2")
    command = [sys.executable, "-m", "uniapl.cli", "compare", *two]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(cells(path) if (path.parent / "compared" / "cells").exists() else {}) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cells(path)
    assert 2 <= len(before) < 6
    compare(two)
    after = cells(path)
    assert len(after) == 6
    assert before.items() <= after.items(), "a finished cell is never run again"
    return path


def test_results_table_and_page(compared: Path) -> None:
    directory = compared.parent / "compared"
    found = json.loads((directory / "results.json").read_text())
    assert list(found["methods"]) == ["base", "sft", "uniapl"]
    assert found["main"] == {"suite": "held_out", "score": "has_letter"}
    # 2 steps of 2 x 4 rollouts and 4 demonstrations, after 2 steps of 8 demonstrations.
    assert found["budget"] == {"rollouts": 16, "demonstrations": 24}
    planned = {label: (row["rollouts"], row["demonstrations"]) for label, row in found["methods"].items()}
    assert planned == {"base": (0, 0), "sft": (0, 40), "uniapl": (16, 24)}
    assert set(found["methods"]["sft"]["scores"]["held_out"]) == {"reward", "has_letter", "length"}
    assert found["methods"]["base"]["cost"]["flops"] == 0
    assert 0 < found["methods"]["uniapl"]["cost"]["rollout_tokens"] <= 16 * 6
    assert found["curves"]["uniapl"]["step"] == [0, 2, 4]
    assert found["seeds"] == [0, 1]
    assert len(found["verdict"]) >= 3
    text = (directory / "compare.html").read_text()
    assert "Budget and cost of a run" in text
    assert not list(directory.glob("work"))
    kept = {path.name for path in (directory / "models").iterdir()}
    assert kept == {name for name in cells(compared) if not name.startswith("base")}
    assert not list((directory / "cells").glob("*.log"))


def test_the_measures_are_those_of_the_model(compared: Path) -> None:
    (name,) = [name for name in cells(compared) if name.startswith("base-0")]
    entry = json.loads(cells(compared)[name])["final"]["held_out"]
    assert entry["expert"]["texts"] == [x * 3 for x in "abcdef"]
    # Three letters and the end token; the base is the policy.
    assert entry["expert"]["tokens"] == [4] * 6
    assert entry["expert"]["logprobs"] == entry["expert"]["base_logprobs"]
    assert all(count == 6 for count, cut in zip(entry["tokens"], entry["truncated"], strict=True) if cut)
    assert len(entry["base_logprobs"]) == len(entry["texts"]) == 6


def test_a_cell_run_again_gives_the_same_numbers(compared: Path) -> None:
    directory = compared.parent / "compared"
    (name,) = [name for name in cells(compared) if name.startswith("uniapl-1")]
    before = json.loads(cells(compared)[name])
    weights = directory / "models" / name / "model.safetensors"
    trained = weights.read_bytes()
    weights.write_bytes(b"of a killed cell")
    (directory / "cells" / f"{name}.json").unlink()
    compare(arguments(compared))
    assert weights.read_bytes() == trained
    after = json.loads(cells(compared)[name])
    assert after["final"] == before["final"]
    assert [point["sample"] for point in after["curve"]] == [point["sample"] for point in before["curve"]]
    costs = [{k: v for k, v in found["cost"].items() if k != "seconds"} for found in (before, after)]
    assert costs[0] == costs[1]


def test_a_dry_run_estimates_from_finished_cells(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(arguments(compared, "--dry-run", "--methods", "sft,grpo")) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 runs remain, 1 at a time, threads of each: 1; about" in shown
    assert "estimated from finished runs" in shown
    assert re.search(r"sft │ \d+ │ 0 │ \d+ │ 2 │ 2 │", shown)
    assert len(cells(compared)) == 6


def test_a_dry_run_without_finished_cells_says_so(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model_dir)
    assert compare(arguments(path, "--dry-run", "--search")) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 runs remain" in shown
    assert "the time of 12 runs is not known" in shown
    assert not (tmp_path / "compared").exists(), "nothing is written"


def test_another_number_of_threads_is_noted(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(compared, "--dry-run")
    place = words.index("--threads")
    assert compare([*words[:place], *words[place + 2 :]]) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert "threads of each: 1" in shown, "as the comparison was begun"
    assert "was begun with" not in shown
    assert compare([*words, "--threads", "3"]) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert "was begun with 1 threads for each run and continues with 3" in shown
    assert "--threads 1 avoids this" in shown
    assert "threads of each: 3" in shown


def test_a_score_that_was_trained_on_is_cautioned(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = compared.parent / "compared"
    original = prepare
    for trained in (True, False):

        def prepared(*given: Any, trained: bool = trained, **options: Any) -> Prepared:
            return replace(original(*given, **options), main_is_trained=trained)

        monkeypatch.setattr("uniapl.cli.compare.prepare", prepared)
        compare(arguments(compared))
        for file in ("results.json", "compare.html"):
            assert ("Caution: this score is what" in (directory / file).read_text()) == trained


@pytest.mark.parametrize(
    ("methods", "metrics", "trained"),
    [
        ("sft,grpo", [], True),
        ("sft", [], False),
        ("sft,grpo", ["lowercase"], True),
        ("sft -> uniapl", ["no_comma"], False),
    ],
)
def test_whether_the_score_is_trained_on(
    methods: str, metrics: list[str], trained: bool, tmp_path: Path, model_dir: Path
) -> None:
    path = write(tmp_path, model_dir)
    values = yaml.safe_load(path.read_text())
    values["evaluation"]["metrics"] = metrics
    found = prepare(resolve(values, path=path), parse_methods(methods), search=False)
    assert found.main_is_trained == trained


def test_a_dry_run_needs_no_judge(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert compare(arguments(write(tmp_path, model_dir), "--dry-run", "--judge", "nothing")) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("row", "training rows"),
        ("suite", "suite 'held_out'"),
        ("metric", "file of '.*metric.py:has_letter'"),
        ("key", r"recipe key optim\.learning_rate"),
        ("steps", "budget"),
        ("template", ".*chat template"),
    ],
)
def test_a_changed_input_is_an_error(change: str, named: str, compared: Path) -> None:
    files = {"row": "train.jsonl", "suite": "held_out.jsonl", "metric": "metric.py"}
    template = compared.parent / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    flags = {
        "key": ["--optim.learning-rate", "0.5"],
        "steps": ["--max-steps", "6"],
        "template": ["--model.chat-template-path", str(template)],
    }.get(change, [])
    path = compared.parent / files.get(change, "train.jsonl")
    before = path.read_text()
    extra = {"row": '{"prompt": "new"}\n', "suite": '{"prompt": "new", "letter": "a"}\n', "metric": "# x\n"}
    path.write_text(before + extra.get(change, ""))
    try:
        with pytest.raises(UsageError, match=rf"these have changed: {named}.*Choose another --output-dir"):
            compare(arguments(compared, *flags))
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"evaluation": {}}, [], "evaluation.suites is empty"),
        ({}, ["--seeds", "1"], "one seed has no interval"),
        ({}, ["--methods", "sft,grop"], "unknown method 'grop'"),
        ({}, ["--jobs", "0"], "--jobs and --threads must be at least 1"),
        (
            {"rewards": {}, "method": "sft"},
            ["--methods", "sft,grpo"],
            "--methods 'grpo': method 'grpo' samples",
        ),
        (
            {"method": "grpo"},
            ["--methods", "uniapl"],
            "--methods 'uniapl': .*the budget has none.*--method uniapl",
        ),
        ({}, ["--methods", "sft,opd"], "--methods 'opd': .*teacher"),
        ({}, ["--methods", "gad[discriminator.kind=polar]"], "'gad.*needs discriminator.model_name_or_path"),
        ({}, ["--judge", "nothing"], r"--judge needs sentence-transformers: pip install 'uniapl\[judge\]'"),
        ({}, ["--no-such-key", "1"], "no.such.key|no-such-key"),
    ],
)
def test_bad_input_is_an_error_before_the_first_cell(
    changes: dict[str, Any], words: list[str], message: str, tmp_path: Path, model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    path = write(tmp_path, model_dir, **changes)
    with pytest.raises(UsageError, match=message):
        compare(arguments(path, *words))
    assert not (tmp_path / "compared").exists()


def test_training_prompts_in_a_suite_are_noted(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model_dir)
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write('{"prompt": "say c.", "letter": "c"}\n')
    compare(arguments(path, "--dry-run"))
    assert "note: 1 training prompts are also in the suite 'held_out'" in capsys.readouterr().out


def test_a_recipe_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare([])
    assert "RECIPE.yaml" in capsys.readouterr().err
    assert cli.run(["compare", "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def job(path: Path, tmp_path: Path, **changes: Any) -> Job:
    resolved = resolve(yaml.safe_load(path.read_text()), path=path)
    variants = parse_methods("sft")
    prepared = prepare(resolved, variants, search=changes.pop("search", False))
    cell = prepared.plan.cell(variants[0], 0)
    shared = {"cut": prepared.cut, "base": prepared.base, "eval_steps": 0, "work": str(tmp_path / "work")}
    return Job(**{"cell": cell, "result": "", **shared, **changes})


def test_held_out_demonstrations_are_cut_if_the_suites_have_none(tmp_path: Path, model_dir: Path) -> None:
    path = write(tmp_path, model_dir)
    suite = tmp_path / "held_out.jsonl"
    suite.write_text('{"prompt": "tell a.", "letter": "a"}\n')
    found = job(path, tmp_path)
    # A tenth of the 13 rows with a demonstration.
    ((name, (row,)),) = found.cut.items()
    assert name == "held-out demonstrations"
    assert letter_rows(26)[row - 1]["completion"]
    outcome = run_cell(found)
    assert outcome["final"][name]["expert"]["texts"] == [letter_rows(26)[row - 1]["completion"]]
    suite.write_text('{"prompt": "tell a.", "letter": "a"}\n')
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows(8)))
    with pytest.raises(UsageError, match=r"4 training demonstrations are too few.*evaluation\.suites"):
        job(path, tmp_path)


def test_validation_prompts_are_the_same_for_all_and_never_trained_on(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from uniapl.compare import cell as cell_module

    path = write(tmp_path, model_dir)
    found = job(path, tmp_path, search=True)
    rows = found.cut["validation"]
    assert len(rows) == 3, "a tenth of 26 prompts, rounded"
    assert rows == job(path, tmp_path, search=True).cut["validation"]
    trained: list[Any] = []
    real = cell_module.train_resolved

    def train(recipe: Any, given: Any) -> Any:
        trained.append(given.train_dataset)
        return real(recipe, given)

    monkeypatch.setattr(cell_module, "train_resolved", train)
    outcome = run_cell(replace(found, cell=replace(found.cell, search=True)))
    assert list(outcome["final"]) == ["validation"]
    left_out = [letter_rows(26)[row - 1] for row in rows]
    assert len(trained[0]) == 23
    assert not [row for row in trained[0] if row in left_out]
    run_cell(found)
    assert trained[1] is None, "the table's cells train on all rows"


def test_costs_by_hand() -> None:
    common = {"step_time": 2.0, "reward": 0.5}
    records = [
        {"step": 1, "stage": 0, "tokens/rollout": 0, "tokens/sft": 100, **common},
        {"step": 2, "stage": 1, "tokens/rollout": 50, "tokens/sft": 10, **common},
    ]
    stages = [resolve({"method": "sft"}).config, resolve({"method": "grpo"}).config]
    found = costs(records, stages, 1000, {2: {"suite": {}}})
    # 6 x 100 tokens; 2 and 6 x 50 tokens and 6 x 10 tokens; times 1,000 parameters.
    assert found["cost"] == {"rollout_tokens": 50, "trained_tokens": 160, "flops": 1_060_000, "seconds": 4.0}
    (point,) = found["curve"]
    assert (point["step"], point["flops"], point["metrics"]) == (2, 1_060_000, {"reward": 0.5})
    records[1]["tokens/discarded"] = 20
    found = costs(records, stages, 1000, {})
    # 30 tokens are sampled and trained, 20 only sampled: 6 x 20 tokens less than above.
    assert found["cost"] == {"rollout_tokens": 50, "trained_tokens": 140, "flops": 940_000, "seconds": 4.0}
    # Pairs of the data: trained, and read by the reference.
    pairs = [{"step": 1, "stage": 0, "tokens/rollout": 0, "tokens/sft": 0, "tokens/pref": 40, **common}]
    found = costs(pairs, [resolve({"method": "dpo"}).config], 1000, {})
    assert found["cost"] == {"rollout_tokens": 0, "trained_tokens": 40, "flops": 320_000, "seconds": 2.0}


def test_the_first_warning_of_each_rule() -> None:
    log = [{"step": 3, "rule": "a"}, {"step": 4, "rule": "b"}, {"step": 7, "rule": "a"}]
    assert first_warnings(log) == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    ("recipe", "flops"),
    [
        ({"method": "grpo"}, 8),
        ({"method": "grpo", "objective": {"beta": 0.1}}, 10),
        ({"method": "grpo", "objective": {"pref_weight": 0.1}}, 10),
        # The reference reads the pairs of the data, which are not rollouts.
        ({"method": "grpo", "objective": {"pref_weight": 0.1, "pref_pairs": "rejected"}}, 8),
        ({"method": "a-grpo"}, 8 + 2 + 2 * 6),
        ({"method": "uniapl", "discriminator": {"kind": "head"}}, 10),
        ({"method": "uniapl", "discriminator": {"kind": "polar"}}, 12),
    ],
)
def test_flops_of_a_rollout_token(recipe: dict[str, Any], flops: int) -> None:
    assert flops_per_token(resolve(recipe).config) == flops


def test_trackers_reach_every_run_and_change_none(model_dir: Path, tmp_path: Path) -> None:
    """Cells keep their names and what they depend on, so that a comparison can be tracked later."""
    path = write(tmp_path, model_dir)
    values = yaml.safe_load(path.read_text())
    variants = parse_methods("grpo")
    plain = prepare(resolve(values), variants, search=False)
    tracking = {"report_to": ["tensorboard"], "run_name": "mine", "run_group": "series"}
    tracked = prepare(resolve(values | tracking), variants, search=False)
    shared = {"report_to": ["tensorboard"], "run_group": "series"}
    assert tracked.base == plain.base | shared
    assert tracked.fingerprint == plain.fingerprint
    assert tracked.plan.cell(variants[0], 0) == plain.plan.cell(variants[0], 0)

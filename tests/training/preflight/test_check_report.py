"""`uniapl check` reports settings that are allowed and that a new user rarely intends."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.runs import write_recipe
from support.tiny import letter_rows, save_model
from uniapl import cli

TEMPLATE = "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}<turn>a"


def report(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(["check", str(path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_strings_that_a_chat_model_reads_verbatim(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_model = save_model(tmp_path / "chat", chat_template=TEMPLATE)
    suite = tmp_path / "held_out.jsonl"
    suite.write_text('{"prompt": "hi"}\n')
    rows = [
        *letter_rows(5),
        {"prompt": "<turn>uhi<eos><turn>a", "completion": "already rendered"},
        {"prompt": [{"role": "user", "content": "hi"}]},
    ]
    path = write_recipe(
        *(tmp_path, chat_model, rows),
        objective={"lambda_adv": 0},
        evaluation={"suites": [str(suite)], "max_completion_length": 3},
    )
    remedy = (
        "prompts are strings, and the model reads them verbatim, without its chat template: set "
        "data.prompt_format to chat to make each one a user message, or to text to keep them without this "
        "note"
    )
    noted = [note for note in report(capsys, path)["notes"] if "verbatim" in note]
    assert noted == [f"5 of 7 {remedy}", f"suite 'held_out': 1 of 1 {remedy}"]
    for chosen in ("chat", "text"):
        assert "verbatim" not in str(report(capsys, path, "--data.prompt-format", chosen)["notes"])


def test_strings_of_a_model_without_a_chat_template(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "verbatim" not in str(report(capsys, write_recipe(tmp_path, model_dir))["notes"])


PAIRS = [
    {"prompt": "say a", "completion": "aa"},
    {"prompt": "say b", "chosen": "bb", "rejected": "bb"},
    {"prompt": "say c", "chosen": "cc", "rejected": "d"},
    {"prompt": "say d", "chosen": "d", "rejected": "ccc"},
]


def test_the_pairs_of_dpo(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, model_dir, PAIRS, method="dpo", rewards={"functions": []})
    found = report(capsys, path)
    notes = [
        "1 of 4 demonstrations have no 'rejected', form no preference pair and {} (rows 1)",
        "1 of 4 demonstrations have equal 'chosen' and 'rejected', form no preference pair and {} (rows 2)",
    ]
    unused = [note.format("are not used by method 'dpo'") for note in notes]
    assert [note for note in found["notes"] if "preference pair" in note] == unused
    assert found["stages"][0]["preference pairs of the data"] == 2
    assert found["stages"][0]["demonstrations"] == 2
    assert (found["preview"]["row"], found["preview"]["text"]) == (3, "say c[[cc<eos>]]")
    assert cli.run(["check", str(path)]) == 0
    assert "\nits rejected completion:\n[[d<eos>]]\nok" in capsys.readouterr().out
    flags = ["--method", "chord-mu", "--objective.pref-weight", "1", "--objective.pref-pairs", "rejected"]
    flags += ["--rewards.functions", "lowercase"]
    mixed = report(capsys, path, *flags)
    single = [note.format("are only demonstrations") for note in notes]
    assert [note for note in mixed["notes"] if "preference pair" in note] == single
    assert mixed["stages"][0]["demonstrations"] == 4
    rollouts = report(capsys, path, *flags, "--objective.pref-pairs", "rollouts")
    assert rollouts["stages"][0]["prompts whose rollouts are paired with their demonstration"] == 4
    assert rollouts["preview"]["rejected"] is None


def test_the_rest_is_checked_where_the_output_directory_is_taken(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, model_dir)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert cli.run(["check", str(path)]) == 2
    printed = capsys.readouterr()
    assert "reward 'lowercase': applies to 12 rows" in printed.out
    assert "estimated peak" in printed.out
    assert "ok" not in printed.out.splitlines()
    assert printed.err.startswith(f"error: output_dir '{tmp_path / 'run'}' already holds a run")
    assert cli.run(["check", str(path), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"] == printed.err.removeprefix("error: ").strip()
    assert report(capsys, path, "--overwrite")["error"] is None
    assert cli.run(["check", str(path), "--rewards.functions", "lowercasee"]) == 2
    assert "lowercasee" in capsys.readouterr().err, "the first error of the recipe"


@pytest.mark.parametrize(
    ("flags", "drawn"),
    [
        (["--max-steps", "4"], 12),
        (["--max-steps", "5"], None),  # 15 of 12 prompts
        (["--max-steps", "5", "--batching.cold-start-steps", "2"], 9),
        (["--max-steps", "2", "--rollout.max-resample-times", "1"], 12),
        (["--max-steps", "3", "--rollout.max-resample-times", "1"], None),
        (["--max-steps", "4", "--batching.prompt-selection", "uniform"], None),
        (["--max-steps", "4", "--method", "sft"], None),
    ],
)
def test_informative_prompts_in_less_than_one_pass(
    flags: list[str],
    drawn: int | None,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path, model_dir)
    found = report(capsys, path, "--batching.prompt-selection", "informative", *flags)
    notes = [note for note in found["notes"] if "skips no prompt" in note]
    assert bool(notes) == (drawn is not None)
    assert all(f"draw {drawn} prompts, at most one pass over the 12 of the data" in note for note in notes)


@pytest.mark.parametrize(("first", "noted"), [("informative", False), ("uniform", True)])
def test_informative_prompts_in_two_stages(
    first: str, noted: bool, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stage skips prompts of the first, if that stage kept pass rates."""
    stages = [
        {"method": "grpo", "max_steps": 3, "batching": {"prompt_selection": selection}}
        for selection in (first, "informative")
    ]
    path = write_recipe(tmp_path, model_dir, stages=stages)
    assert ("skips no prompt: the steps draw 9" in str(report(capsys, path)["notes"])) == noted

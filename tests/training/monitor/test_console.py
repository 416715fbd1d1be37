"""Output of a run on a terminal, in files and as JSON; trackers and chat."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import uniapl
from support.documents import ROOT
from support.runs import lines, recipe, train, write_recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.config import Config
from uniapl.config.resolve import resolve
from uniapl.training.monitor.console import LINE, RunView, hidden_columns

CHAT = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ' ' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant ' }}{% endif %}"
)
METRICS: dict[str, Any] = {
    "step": 7,
    "reward": 0.5,
    "pass_rate": 0.25,
    "completions/mean_length": 12.0,
    "completions/length_ratio": 1.5,
    "rollout/entropy_estimate": 1.25,
    "loss": 0.125,
    "loss/sft": 2.0,
    "weight/mu": 0.4,
    "tokens/sft": 1234,
    "loss/rl": -0.5,
    "weight/rl": 0.6,
    "tokens/rl": 0,
    "loss/adv": 0.25,
    "weight/lambda_adv": 1.0,
    "tokens/adv": 99,
    "discriminator/win_rate": 0.3,
    "adversary/reward_change": 0.21,
    "step_time": 1.5,
}


def on_a_terminal(width: int, warnings: dict[str, str]) -> str:
    """The table below the lines."""
    view = RunView(100, visible=True)
    view.console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    view.start_step(7)
    with view.phase("update"):
        pass
    view.warnings = warnings
    view.step_done(7, METRICS, line=False)
    view.console.print(view._table())
    file = view.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_line_of_a_step_shows_what_the_adversary_changed(capsys: pytest.CaptureFixture[str]) -> None:
    long = METRICS | {"completions/mean_length": 512.3, "sft/nll": 1.25}
    RunView(999, visible=True).step_done(999, long | {"step_time": 12.3}, line=True)
    assert capsys.readouterr().out == (
        "999/999 reward 0.500 loss 0.12 nll 1.25 win 0.30 adv 0.21 mu 0.40 lam 1.00 len 512.3 s 12.3\n"
    )


def test_the_line_and_the_table_of_a_run_with_tools(capsys: pytest.CaptureFixture[str]) -> None:
    """One column more, and only then."""
    names = ("call_frequency", "failure_frequency", "malformed", "unanswered")
    tools = {f"tools/{name}": value for name, value in zip(names, (1.25, 0.5, 0.1, 0.0), strict=True)}
    long = METRICS | {"completions/mean_length": 512.3, "sft/nll": 1.25, "step_time": 12.3}
    view = RunView(999, visible=True)
    view.step_done(999, long | tools, line=True)
    assert capsys.readouterr().out.endswith(" len 512.3 tools 1.25 s 12.3\n")
    row = "calls 1.25  failed 0.50  malformed 0.10  unanswered 0.00"
    view.console.print(view._table())
    assert row in capsys.readouterr().out
    view.step_done(999, long, line=True)
    view.console.print(view._table())
    assert "tools" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("uniapl", {"mu", "lam"}),
        ("sft", set()),
        ("a-sft", {"lam"}),
        ("grpo", set()),
        ("a-grpo", {"lam"}),
        ("chord-mu", {"mu"}),
        ("chord-phi", {"mu"}),
        ("gad", {"lam"}),
        ("opd", set()),
        ("dpo", set()),
    ],
)
def test_weights_are_shown_only_where_the_method_has_them(
    method: str, expected: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    view = RunView(100, visible=True)
    view.hidden = hidden_columns(resolve({"method": method}).config)
    view.step_done(7, METRICS | {"loss/teacher": 0.375}, line=True)
    names = set(re.findall(r"[a-z]+", capsys.readouterr().out))
    assert names & {"mu", "lam"} == expected
    assert {"reward", "loss", "teacher", "len", "s"} <= names


def test_a_run_shows_the_columns_of_its_stage(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"model_name_or_path": str(save_model(tmp_path / "teacher", seed=1))}
    stages = [{"method": "sft", "max_steps": 1}, {"method": "opd", "max_steps": 1}]
    train(recipe(model_dir, tmp_path / "run", stages=stages, teacher=teacher))
    shown = [line.split()[1::2] for line in capsys.readouterr().out.splitlines() if re.match(r"\d/2 ", line)]
    assert shown == [["loss", "nll", "s"], ["reward", "loss", "teacher", "len", "s"]]


def test_every_column_is_documented() -> None:
    columns = [column.split()[0] for column in LINE.split("  ")]
    table = (ROOT / "docs" / "first-run.md").read_text().split("## Console output")[1].split("\n\nEvery")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == columns


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_on_a_terminal(width: int) -> None:
    shown = on_a_terminal(width, {"truncation": "raise rollout.max_completion_length " * 4})
    assert all(len(line) <= width for line in shown.splitlines())
    for part in ("update", "7/100", "1.5 s/step", "reward 0.500", "pass 0.25", "length 12.0", "entropy 1.25"):
        assert part in shown
    assert re.search(r"demonstrations +loss 2.000 +mu 0.40 +tokens 1,234", shown)
    assert re.search(r"adversary +loss 0.250 +lambda 1.00 +tokens 99 +win rate 0.30 +change 0.21", shown)
    assert "rewards" not in shown.replace("max_completion", ""), "the component has no tokens in this step"
    assert re.search(r"truncation +raise", shown)


def test_lines_without_control_characters_outside_a_terminal(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run", log_completions_steps=2))
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    numbered = [line for line in shown.splitlines() if re.match(r"\d/4 ", line)]
    assert [line[:3] for line in numbered] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(len(line) <= 80 for line in numbered)
    written = lines(tmp_path / "run" / "completions.jsonl")
    demonstrated = {step: [r for r in written if r["step"] == step and r["demonstration"]] for step in (2, 4)}
    expected = [record for step in (2, 4) for record in demonstrated[step][:2]]
    assert expected
    for record in expected:
        assert re.search(rf"prompt +{re.escape(record['prompt'])}", shown)
        assert re.search(rf"expert +{record['demonstration']}", shown)
    assert shown.count("  expert") == len(expected), "in every other step"


def test_completions_are_shown_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup stays text, control characters are removed, and long completions are cut."""
    completion = {"text": "[red]a\x1b[31mb\nc" + "x" * 500, "reward": None}
    record = {
        "prompt": [{"role": "user", "content": "why?"}],
        "demonstration": None,
        "completions": [completion],
    }
    RunView(1, visible=True).completions([record])
    shown = capsys.readouterr().out
    assert "[red]a [31mb cx" in re.sub(r"\s+", " ", shown)
    assert "\x1b" not in shown
    assert "why?" in shown
    assert "expert" not in shown
    assert len(shown) < 600


def test_quiet_and_json(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, model_dir)
    assert cli.run(["train", str(path), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.run(["train", str(path), "--json", "--overwrite", "True"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == lines(tmp_path / "run" / "metrics.jsonl")
    assert "steps done" in shown.err
    assert cli.run(["train", str(path), "--json", "--quiet"]) == 2
    assert "choose one" in capsys.readouterr().err


@pytest.mark.parametrize(("threshold", "expected"), [(1.0, 0.75), (2.0, 0.5), (3.0, 0.25), (3.5, 0.0)])
def test_the_pass_rate_counts_completions_at_the_threshold(
    threshold: float, expected: float, model_dir: Path, tmp_path: Path
) -> None:
    def points(completions: list[str]) -> list[float]:
        return [float(n % 4) for n in range(len(completions))]

    values = recipe(model_dir, tmp_path, max_steps=1, objective={"pass_threshold": threshold})
    train(values, reward_functions=[points])
    assert lines(tmp_path / "metrics.jsonl")[0]["pass_rate"] == expected


def test_tensorboard_gets_the_metrics(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(model_dir, tmp_path / "run", report_to="tensorboard"))
    (events, *_) = [
        EventAccumulator(str(file)).Reload()
        for file in (tmp_path / "run" / "uniapl").rglob("events*")
        if "loss" in EventAccumulator(str(file)).Reload().Tags()["scalars"]
    ]
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    written = [(r["step"], r["loss"]) for r in lines(tmp_path / "run" / "metrics.jsonl")]
    assert got == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in written]


def test_a_tracker_that_is_not_installed(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(uniapl.UsageError, match="'wandb' is not installed: pip install wandb"):
        train(recipe(model_dir, tmp_path / "run", report_to=["wandb"]))
    assert Config(report_to="none").report_to == ()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("template", [CHAT, None])
def test_chat(
    template: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line gets a completion; at temperature 0 equal lines get equal ones, unless a chat has history."""
    path = save_model(tmp_path / "model", chat_template=template)
    replies: list[list[str]] = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("say a.\n\nsay a.\n"))
        assert cli.run(["chat", str(path), "--temperature", "0", "--max-new-tokens", "12"]) == 0
        replies.append(capsys.readouterr().out.splitlines())
    assert replies[0] == replies[1]
    assert len(replies[0]) >= 2
    if template is None:
        assert replies[0][0] == replies[0][1]


def test_chat_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chat", str(tmp_path / "nothing")]) == 2
    assert "directory not found" in capsys.readouterr().err

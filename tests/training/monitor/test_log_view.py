"""What `uniapl.train` prints and logs when it is called from Python."""

import logging
from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.runs import has_letter, recipe
from support.tiny import letter_rows, save_model
from uniapl.training.monitor.log_view import make_view


def train_one_step(tmp_path: Path, **settings: Any) -> None:
    values = recipe(save_model(tmp_path / "model"), tmp_path / "run", max_steps=1, log_completions_steps=1)
    uniapl.train(values, train_dataset=letter_rows(), reward_functions=[has_letter], **settings)


def test_progress_goes_to_the_logger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="uniapl")
    train_one_step(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.name == "uniapl"]
    assert any(line.startswith("1/1 reward ") for line in lines)
    assert any(line.startswith("  prompt") for line in lines), "sampled completions are logged too"
    assert lines[-1].startswith("1 steps done; model: ")
    assert capsys.readouterr().out == ""


def test_without_logging_only_warnings_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_one_step(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/1 reward" not in captured.err


def test_quiet_prints_and_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="uniapl")
    model = save_model(tmp_path / "model")
    capsys.readouterr()
    values = recipe(model, tmp_path / "run", max_steps=1, log_completions_steps=1)
    uniapl.train(values, train_dataset=letter_rows(), reward_functions=[has_letter], quiet=True)
    assert capsys.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name == "uniapl"]


def test_health_warnings_have_the_level_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="uniapl")
    view = make_view(1, visible=True, show="log")
    view.say("step 3: warning: the entropy fell")
    view.say("[not markup] " + "long " * 60)
    make_view(1, visible=False, show="log").say("step 3: another rank")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "step 3: warning: the entropy fell"),
        ("INFO", ("[not markup] " + "long " * 60).rstrip()),
    ]

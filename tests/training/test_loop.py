"""The way from the command line to the loss is short enough to read."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from support.runs import write_recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.training.update import policy_step


def test_at_most_nine_calls_lead_from_the_command_line_to_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, save_model(tmp_path / "model"), max_steps=1)
    sft_loss, stacks = policy_step.sft_loss, list[list[str]]()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        stacks.append([frame.function for frame in inspect.stack()[1:]])
        return sft_loss(*args, **kwargs)

    monkeypatch.setattr(policy_step, "sft_loss", recorded)
    assert cli.run(["train", str(path), "--quiet"]) == 0
    calls = stacks[0][: stacks[0].index("run") + 1]
    assert calls[-4:] == ["run_stage", "train_resolved", "train", "run"]
    assert len(calls) <= 9, calls

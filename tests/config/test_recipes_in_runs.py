"""Recipes and flags in whole runs."""

from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.runs import recipe, train
from uniapl.config.resolve import resolve


def test_notes_of_stages_are_shown(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(model_dir, tmp_path / "run", stages=[{"method": "sft", "max_steps": 1}]))
    assert "note: method 'sft' sets objective.beta = 0.0 (recipe: 0.05)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values", [{"method": ["sft"]}, {"seed": 2**32}, {"optim": {"learning_rate": float("inf")}}]
)
def test_odd_values(values: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(uniapl.UsageError):
        train(recipe(model_dir, tmp_path / "run", **values))


def test_an_empty_section_says_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(model_dir, tmp_path / "run", method="sft", max_steps=1)
    train(values | {"objective": {}})
    assert "note" not in capsys.readouterr().out


def test_overwrite_needs_no_value() -> None:
    assert resolve({}, ["--overwrite", "--max-steps", "3"]).config.overwrite
    assert resolve({}, ["--overwrite"]).config.overwrite
    assert not resolve({}, ["--overwrite", "False"]).config.overwrite

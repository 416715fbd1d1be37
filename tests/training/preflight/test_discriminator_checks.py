"""Settings of the discriminator that its kind or its loss does not have."""

from pathlib import Path
from typing import Any

import pytest

from support.runs import recipe, train
from support.tiny import letter_rows
from uniapl import UsageError

HEAD = {"kind": "head"}
FROZEN = {"kind": "reference-likelihood"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (HEAD | {"loss": "paired"}, "discriminator.loss: kind 'head' has only the unpaired loss"),
        (FROZEN | {"loss": "unpaired"}, "discriminator.loss: kind 'reference-likelihood' is not trained"),
        (FROZEN | {"mismatched_demonstrations": 1}, "mismatched_demonstrations: kind .* is not trained"),
        (HEAD | {"label_smoothing": 0.1}, "discriminator.label_smoothing applies to pairs"),
        (FROZEN | {"label_smoothing": 0.1}, "discriminator.label_smoothing applies to pairs"),
        ({"loss": "unpaired", "label_smoothing": 0.1}, "discriminator.label_smoothing applies to pairs"),
        ({"log_probability_features": False}, "log_probability_features needs discriminator.kind head"),
        (FROZEN | {"log_probability_features": False}, "log_probability_features needs"),
        ({"mismatched_demonstrations": -1}, "discriminator.mismatched_demonstrations: must be greater"),
        ({"loss": "pairs"}, "discriminator.loss: must be 'paired' or 'unpaired'"),
    ],
)
def test_a_setting_without_effect_is_refused(
    settings: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(recipe(model_dir, tmp_path / "run", discriminator=settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["head", "bradley-terry"])
@pytest.mark.parametrize("same", ["prompt", "completion"])
def test_mismatched_demonstrations_need_two_prompts(
    kind: str, same: str, model_dir: Path, tmp_path: Path
) -> None:
    rows = [row | {same: "aaa"} for row in letter_rows(4, demonstrated=range(4))]
    settings = {"kind": kind, "mismatched_demonstrations": 1}
    with pytest.raises(UsageError, match="different demonstrations of at least two prompts"):
        train(recipe(model_dir, tmp_path / "run", discriminator=settings), train_dataset=rows)


@pytest.mark.parametrize(
    "settings",
    [
        HEAD | {"loss": "unpaired", "mismatched_demonstrations": 0, "log_probability_features": False},
        {"loss": "unpaired", "lora_r": 2, "mismatched_demonstrations": 1, "in_context_demonstration": True},
        {"loss": "paired", "lora_r": 2, "mismatched_demonstrations": 1, "label_smoothing": 0.1},
        FROZEN | {"mismatched_demonstrations": 0, "log_probability_features": True},
    ],
    ids=["head", "unpaired", "paired", "frozen"],
)
def test_settings_that_have_an_effect_run(settings: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    train(recipe(model_dir, tmp_path / "run", max_steps=2, discriminator=settings))

"""A comparison samples its models as training does."""

import json
from pathlib import Path

import pytest
import torch

from support.runs import letter_rows, recipe
from uniapl.compare.sampling import Suites
from uniapl.config.resolve import resolve
from uniapl.models.loading import load_model


@pytest.mark.parametrize("bf16", [False, True])
def test_the_precision_is_that_of_training(bf16: bool, model_dir: Path, tmp_path: Path) -> None:
    """Completions are sampled under the run's autocast, and likelihoods are computed in fp32."""
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows()[:2]))
    config = resolve(
        recipe(model_dir, tmp_path / "run")
        | {
            "data": {"path": str(tmp_path / "held_out.jsonl")},
            "rewards": {"functions": ["lowercase"]},
            "evaluation": {"suites": [str(tmp_path / "held_out.jsonl")], "max_completion_length": 4},
            "optim": {"bf16": bf16},
        }
    ).config
    suites = Suites.load(config, {}, search=False)
    model = load_model(suites.source)
    seen: list[bool] = []
    model.base_model.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    sample, results = suites.sample(model, seed=0)
    assert seen
    assert set(seen) == {bf16}
    seen.clear()
    suites.add_likelihoods(sample, results, model, model)
    assert seen
    assert set(seen) == {False}

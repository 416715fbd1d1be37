"""Runs on several processes, by DDP and by FSDP2: the same as on one, also from one another's checkpoints."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.processes import run_processes
from support.runs import evaluated, lines, recipe, timeless, train
from support.tiny import save_model
from uniapl.training.checkpoint import directory as checkpoint

pytestmark = pytest.mark.distributed

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` tells the processes of an FSDP2 configuration."""
METHODS = ("uniapl", "grpo")


def six_steps(model: Path, output: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A run of six steps that is saved in its middle; 3 prompts do not divide by 2 processes, nor by 4."""
    objective: dict[str, Any] = {"beta": 0.05, "reference_step": 2, "mu_decay_steps": 6}
    if method == "uniapl":
        objective["lambda_controller"] = "dual"
    settings = {"max_steps": 6, "save_steps": 3, "log_gradients_steps": 2, "objective": objective}
    settings |= evaluated(model.parent, num_samples=2)
    return recipe(model, output, method=method, **settings | changes)


def _train_all(folder: Path, launch: dict[str, str], recipes: Sequence[dict[str, Any]]) -> None:
    os.environ |= launch
    for values in recipes:
        train(values)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and both methods' runs on one process."""
    folder = tmp_path_factory.mktemp("alone")
    save_model(folder / "model")
    for method in METHODS:
        train(six_steps(folder / "model", folder / method, method))
    return folder


def halfway(model: Path, run: Path, copy: Path) -> dict[str, Any]:
    """The recipe that goes on, in a copy of a run, from its checkpoint in the middle."""
    shutil.copytree(run, copy)
    return six_steps(model, copy, "uniapl", resume=str(checkpoint.checkpoint_path(copy, 3)))


def assert_close(got: Path, expected: Path) -> None:
    """The same six steps, and the same tensors in the last checkpoint."""
    mine, theirs = (timeless(lines(path / "metrics.jsonl")) for path in (got, expected))
    assert [record["step"] for record in mine] == list(range(1, 7))
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5)
        scores = {key: value for key, value in other.items() if key.startswith("eval/")}
        assert ("eval/held_out/reward" in scores) == (one["step"] % 2 == 0)
        assert {key: one[key] for key in scores} == scores, "each process evaluates a part of the prompts"
        for key, value in other.items():
            close = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert one[key] == close, (one["step"], key)
    last = (checkpoint.checkpoint_path(path, 6) for path in (got, expected))
    ours, others = ({file.name: file for file in path.glob("*.safetensors")} for path in last)
    assert ours.keys() == others.keys()
    for name, file in others.items():
        tensors = load_file(file)
        saved = load_file(ours[name])
        assert saved.keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("launch", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_a_run_does_not_depend_on_the_number_of_processes(
    launch: dict[str, str], world: int, alone: Path, tmp_path: Path
) -> None:
    """From its beginning, from the checkpoint of one process, and on one process from theirs."""
    model = alone / "model"
    recipes = [six_steps(model, tmp_path / method, method) for method in METHODS]
    recipes.append(halfway(model, alone / "uniapl", tmp_path / "from one"))
    assert run_processes(world, _train_all, tmp_path, launch, recipes) == [0] * world
    for method in METHODS:
        assert_close(tmp_path / method, alone / method)
    assert_close(tmp_path / "from one", alone / "uniapl")
    train(halfway(model, tmp_path / "uniapl", tmp_path / "on one"))
    assert_close(tmp_path / "on one", alone / "uniapl")


def test_stages_with_shards(alone: Path, tmp_path: Path) -> None:
    """The second stage starts from what the first one's shards have learnt."""
    stages = [{"method": "sft", "max_steps": 2}, {"method": "grpo", "max_steps": 2}]
    values = [recipe(alone / "model", tmp_path / name, stages=stages) for name in ("one", "two")]
    train(values[0])
    assert run_processes(2, _train_all, tmp_path, FSDP2, [values[1]]) == [0, 0]
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)

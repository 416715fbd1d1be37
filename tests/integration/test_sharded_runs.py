"""Runs by `accelerate launch` with the profiles of recipes/accelerate, on CPUs; see test_processes.py too."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from support.runs import lines, run_processes, timeless, write_recipe
from support.tiny import save_model
from uniapl import cli
from uniapl.training.checkpoint import directory as checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sharded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of uniapl, and its ten steps: on one process, "one"; shared out to two, "two"."""
    folder = tmp_path_factory.mktemp("uniapl")
    run_both(
        folder,
        model_dir,
        method="uniapl",
        objective={"lambda_controller": "dual", "beta": 0.05, "mu_decay_steps": 8, "reference_step": 2},
        optim={"learning_rate": 3e-3, "weight_decay": 0.5, "gradient_checkpointing": True},
        log_gradients_steps=2,
    )
    return folder


def run_both(folder: Path, model_dir: Path, **settings: Any) -> None:
    path = write_recipe(folder, model_dir, max_steps=10, save_steps=5, **settings)
    assert cli.run(["train", str(path), "--output-dir", str(folder / "one")]) == 0
    words = ["-m", "uniapl.cli", "train", str(path), "--output-dir", str(folder / "two")]
    ended = run_processes("fsdp2", 2, *words)
    assert ended.returncode == 0, ended.stderr
    assert "over 2 processes" in ended.stdout + ended.stderr


def assert_close_runs(got: Path, expected: Path) -> None:
    """Every number of every step, every answer, and all tensors at the end."""
    ours, theirs = (timeless(lines(run / "metrics.jsonl")) for run in (got, expected))
    assert len(theirs) == 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            assert mine[key] == close, (key, mine["step"])
    ours, theirs = (lines(run / "completions.jsonl") for run in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert [c["text"] for c in mine["completions"]] == [c["text"] for c in other["completions"]]
    ours, theirs = (checkpoint.checkpoint_path(run, 10) for run in (got, expected))
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert sorted(path.name for path in ours.glob("*.safetensors")) == names
    for mine, other in [(ours / name, theirs / name) for name in names] + [
        (run / "final" / "model.safetensors" for run in (got, expected))
    ]:
        assert_close(load_file(mine), load_file(other), atol=1e-5, rtol=1e-4)


def test_uniapl_on_shards(sharded: Path) -> None:
    assert_close_runs(sharded / "two", sharded / "one")


def test_a_frozen_discriminator_reads_the_sharded_policy(model_dir: Path, tmp_path: Path) -> None:
    """Of density-ratio: a model of the expert against the policy as it is now."""
    expert = save_model(tmp_path / "expert", seed=7)
    adversary = {
        "kind": "density-ratio",
        "model_name_or_path": str(expert),
        "density_ratio_reference": "policy",
    }
    run_both(tmp_path, model_dir, method="a-grpo", discriminator=adversary)
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("profile", [None, "multi_gpu"])
def test_shards_checkpoint_is_continued_otherwise(profile: str | None, sharded: Path, tmp_path: Path) -> None:
    """From step 5, alone or by DDP."""
    run = tmp_path / "run"
    shutil.copytree(sharded / "two", run)
    shutil.rmtree(run / "final")
    words = ["train", str(sharded / "recipe.yaml"), "--output-dir", str(run)]
    words += ["--resume", str(checkpoint.checkpoint_path(run, 5))]
    if profile is None:
        assert cli.run(words) == 0
    else:
        ended = run_processes(profile, 2, "-m", "uniapl.cli", *words)
        assert ended.returncode == 0, ended.stderr
    assert_close_runs(run, sharded / "one")


FULL = """
import os, sys
import torch
from uniapl import cli
from uniapl.models.policy import Policy

forward = Policy.forward

def full(self, *inputs, **options):
    if torch.is_grad_enabled() and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return forward(self, *inputs, **options)

Policy.forward = full
sys.exit(cli.run(sys.argv[1:]))
"""


def test_too_little_memory_in_one_process_ends_all(model_dir: Path, tmp_path: Path) -> None:
    """It cannot join the others again; nobody waits for it, and it names what to lower."""
    program = tmp_path / "full.py"
    program.write_text(FULL)
    path = write_recipe(tmp_path, model_dir, method="grpo")
    ended = run_processes("fsdp2", 2, str(program), "train", str(path))
    assert ended.returncode != 0
    assert "lower batching.max_tokens_per_micro_batch" in ended.stderr, ended.stderr

"""Small runs: a recipe on a tiny model, a reward, a way to die half-way, and what the run wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import uniapl
from support.tiny import letter_rows
from uniapl.config.resolve import resolve
from uniapl.training.api import train_resolved
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.given import Given


def recipe(model_dir: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 4,
        "save_steps": 2,
        "model": {"model_name_or_path": str(model_dir)},
        "rollout": {"num_generations": 4, "max_completion_length": 6},
        "objective": {
            **{"mu_peak": 0.5, "mu_valley": 0.02, "mu_decay_steps": 4, "beta": 0.05, "reference_step": 0},
            **{"lambda_adv": 2.0, "adversarial_placement": "loss"},
        },
        "discriminator": {
            **{"kind": "bradley-terry", "warmup_steps": 1, "min_accuracy": 0.0, "learning_rate": 1e-3},
            "replay_size": 4,
        },
        "optim": {"learning_rate": 3e-3, "lr_scheduler_type": "cosine"},
        "batching": {
            **{"cold_start_steps": 0, "prompts_per_step": 3, "demonstrations_per_step": 5},
            "max_tokens_per_micro_batch": 120,
        },
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def has_letter(completions: list[str], letter: list[str]) -> list[float]:
    """Share of an answer that is the asked letter."""
    return [text.count(x) / max(1, len(text)) for text, x in zip(completions, letter, strict=True)]


def evaluated(folder: Path, **settings: Any) -> dict[str, Any]:
    """Changes of a recipe: a suite of 5 prompts is evaluated every second step."""
    suite = folder / "held_out.jsonl"
    suite.write_text(
        "".join(json.dumps({"prompt": f"say {x * n}.", "letter": x}) + "\n" for n, x in enumerate("abcde"))
    )
    return {"eval_steps": 2, "evaluation": {"suites": [str(suite)], "max_completion_length": 4} | settings}


def train(values: dict[str, Any], **settings: Any) -> uniapl.RunResult:
    """Train as the command line does, with its console output."""
    settings = {"train_dataset": letter_rows(), "reward_functions": [has_letter]} | settings
    show = settings.pop("show", "text")
    return train_resolved(resolve(values), Given(**settings), show=show)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k != "step_time"} for r in records]


def assert_same_run(got: Path, expected: Path, step: int) -> None:
    """Bit for bit: what was written of each step, and all of the last checkpoint."""
    assert timeless(lines(got / "metrics.jsonl")) == timeless(lines(expected / "metrics.jsonl"))
    assert lines(got / "completions.jsonl") == lines(expected / "completions.jsonl")
    ours, theirs = (checkpoint.checkpoint_path(run, step) for run in (got, expected))
    names = {file.name for file in theirs.iterdir()}
    assert names & {"model.safetensors", "adapter_model.safetensors"}
    assert {"discriminator.safetensors", "policy_optimizer.safetensors"} <= names
    assert {file.name for file in ours.iterdir()} == names
    for name in names - {"manifest.json"}:
        if name.endswith(".safetensors"):
            mine, other = load_file(ours / name), load_file(theirs / name)
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine), name
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


def run_until(step: int, values: dict[str, Any], **settings: Any) -> None:
    """Train, and die inside the reward function of the step after `step`."""
    calls = 0

    def deadly(completions: list[str], letter: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        # The first call is the trial before training.
        if calls == step + 2:
            raise Killed
        return has_letter(completions, letter)

    deadly.__name__ = "has_letter"
    values = values | {"rewards": {"timeout": None}}
    with pytest.raises(Killed):
        train(values, reward_functions=[deadly], **settings)


PROFILES = Path(__file__).parents[2] / "recipes" / "accelerate"
"""Configurations for `accelerate launch`."""


def launcher(profile: str, processes: int) -> list[str]:
    """What starts a Python program in several processes; its path and arguments follow."""
    config = ["--config_file", str(PROFILES / f"{profile}.yaml")]
    start = [sys.executable, "-m", "accelerate.commands.launch", *config]
    return [*start, "--num_processes", str(processes), "--main_process_port", "0"]


def run_processes(profile: str, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python program in several processes, to its end."""
    return subprocess.run(
        [*launcher(profile, processes), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_recipe(
    tmp_path: Path, model_dir: Path, rows: list[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (letter_rows() if rows is None else rows)))
    values = recipe(
        model_dir, tmp_path / "run", data={"path": str(data)}, rewards={"functions": ["lowercase"]}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path

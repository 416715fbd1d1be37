"""Runs with tools on several processes: the same as on one, also from one another's checkpoints."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from integration.test_tools import SOURCE, Scripted, right, rows
from support.processes import run_processes
from support.runs import lines, recipe, timeless, train
from support.templates import byte_tokenizer, template
from support.tiny import SMALL
from uniapl.training import build_sampler, evaluation
from uniapl.training.checkpoint import directory as checkpoint

pytestmark = pytest.mark.distributed

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def save_start(folder: Path) -> None:
    """A model, the tool, and a suite of prompts."""
    (folder / "mine.py").write_text(SOURCE)
    (folder / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = byte_tokenizer(template("qwen2_5"), "<|im_end|>")
    config = AutoConfig.for_model(
        "qwen3", **{**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def values(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Four steps; 3 prompts do not divide by 2 processes."""
    settings: dict[str, Any] = {
        "rollout": {"tools": [f"{folder / 'mine.py'}:add"], "max_completion_length": 400},
        "batching": {"max_tokens_per_micro_batch": 4000},
        "objective": {"adversarial_placement": "multiply", "beta": 0.05},
        "discriminator": {"kind": "reference-likelihood"},
        "eval_steps": 2,
        "evaluation": {"suites": [str(folder / "suite.jsonl")], "max_completion_length": 400},
    }
    return recipe(folder / "model", output, **settings | changes)


def _train_all(folder: Path, launch: dict[str, str], recipes: Sequence[dict[str, Any]]) -> None:
    os.environ |= launch
    build_sampler.LocalSampler = evaluation.LocalSampler = Scripted  # type: ignore[misc,assignment]
    for one in recipes:
        train(one, train_dataset=rows(), reward_functions=[right])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    save_start(folder)
    assert run_processes(1, _train_all, folder, {}, [values(folder, folder / "one")]) == [0]
    return folder


def assert_close(got: Path, expected: Path) -> None:
    ours, theirs = (timeless(lines(run / "metrics.jsonl")) for run in (got, expected))
    assert len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            assert mine[key] == close, (key, mine["step"])
    ours, theirs = (lines(run / "completions.jsonl") for run in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("text", "messages", "reward"):
            assert [c[name] for c in mine["completions"]] == [c[name] for c in other["completions"]]
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (got, expected))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("launch", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_a_run_with_tools_does_not_depend_on_the_number_of_processes(
    launch: dict[str, str], alone: Path, tmp_path: Path
) -> None:
    """From its beginning, and from the checkpoints in the middle of both."""
    theirs = lines(alone / "one" / "metrics.jsonl")
    assert sum(record["tools/call_frequency"] for record in theirs) > 0.5
    assert theirs[1]["eval/suite/reward"] is not None
    shutil.copytree(alone / "one", tmp_path / "from one")
    middle = str(checkpoint.checkpoint_path(tmp_path / "from one", 2))
    recipes = [values(alone, tmp_path / "two"), values(alone, tmp_path / "from one", resume=middle)]
    assert run_processes(2, _train_all, tmp_path, launch, recipes) == [0, 0]
    assert_close(tmp_path / "two", alone / "one")
    assert_close(tmp_path / "from one", alone / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    (tmp_path / "store").unlink(missing_ok=True)
    resumed = values(alone, tmp_path / "again", resume=str(checkpoint.checkpoint_path(tmp_path / "again", 2)))
    assert run_processes(2, _train_all, tmp_path, launch, [resumed]) == [0, 0]
    mine, other = tmp_path / "again", tmp_path / "two"
    assert timeless(lines(mine / "metrics.jsonl")) == timeless(lines(other / "metrics.jsonl"))
    assert lines(mine / "completions.jsonl") == lines(other / "completions.jsonl")
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (mine, other)]
    assert weights[0] == weights[1]

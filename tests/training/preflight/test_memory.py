"""The memory estimate of `uniapl check`, compared with the measured peak of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from support.tiny import SMALL, letter_rows, make_tokenizer, save_model
from uniapl.cli.check import check_run
from uniapl.config.resolve import resolve
from uniapl.training.preflight.memory import MemoryEstimate

MEASURED = """
import resource, sys
from uniapl import cli
code = cli.run(sys.argv[1:])
print("RSS", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def test_the_text_lists_permanent_and_temporary_memory() -> None:
    """A discriminator has both: its weights are permanent, its update is temporary."""
    gib = 2**30
    stays, passes = {"policy": 2 * gib, "discriminator": 3 * gib}, {"update": 4 * gib, "discriminator": gib}
    estimate = MemoryEstimate(device="cuda", available=10 * gib, stays=stays, passes=passes)
    assert estimate.peak == 9 * gib
    said = "Allocated throughout: policy 2.0 GiB, discriminator 3.0 GiB; in addition, one phase at a time: "
    assert str(estimate).endswith(said + "update 4.0 GiB, discriminator 1.0 GiB"), "it fits"
    for available, phases, remedy in (
        (8, {"update": 4, "rollout": 3}, "Lower batching.max_tokens_per_micro_batch, or set optim.grad"),
        (8, {"update": 3, "rollout": 4}, "Lower rollout.max_batch_size or rollout.max_completion_length"),
        (4, {"update": 4, "rollout": 3}, "What is allocated throughout does not fit: use a smaller model"),
    ):
        passes = {name: count * gib for name, count in phases.items()}
        small = MemoryEstimate(device="cuda", available=available * gib, stays=stays, passes=passes)
        assert str(small).startswith("warning: ")
        assert f". {remedy}" in str(small)


@pytest.mark.parametrize("family", ["gemma2_softcap", "gemma3", "mistral_sliding"])
def test_models_with_windows_are_estimated(family: str, tmp_path: Path) -> None:
    """Their own forward pass decodes; the estimate counts the full context for every layer."""
    save_model(tmp_path / "model", family=family)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows()))
    resolved = resolve(
        {
            "model": {"model_name_or_path": str(tmp_path / "model")},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "rollout": {"max_completion_length": 32, "decoding": "plain"},
            "method": "grpo",
            "rewards": {"functions": ["no_comma"]},
        }
    )
    (estimate,) = check_run(resolved)["memory"]
    assert estimate["passes"]["rollout"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (
            {},
            {
                **{"method": "uniapl", "objective": {"beta": 0.1, "reference_step": 0}},
                "discriminator.kind": "bradley-terry",
            },
        ),
        ({"vocab_size": 100_000, "hidden_size": 128, "num_hidden_layers": 3}, {"method": "grpo"}),
        (
            {"num_hidden_layers": 8, "hidden_size": 320},
            {"model.lora_r": 8, "discriminator.lora_r": 8, "discriminator.kind": "bradley-terry"},
        ),
        (
            {"hidden_size": 384, "num_hidden_layers": 8},
            {"discriminator.kind": "bradley-terry", "discriminator.num_layers": 2},
        ),
    ],
    ids=["discriminator and reference", "a large vocabulary", "adapters", "a copy of two layers"],
)
def test_the_estimate_is_near_what_a_run_takes(
    model: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Within a fifth, the process included; random models rarely end a completion early."""
    shape = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    config = Qwen3Config(**SMALL | shape | {"head_dim": 64, "max_position_embeddings": 2048} | model)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [row | {"prompt": "a" * 100 + row["prompt"]} for row in letter_rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Groups of equal rewards have no gradient and would need no memory.
    reward = "def reward(completion_ids, **_):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    (tmp_path / "varied.py").write_text(reward)
    values = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "rewards": {"functions": [f"{tmp_path / 'varied.py'}:reward"]},
        "rollout": {"num_generations": 8, "max_completion_length": 128},
        "batching": {"prompts_per_step": 4, "demonstrations_per_step": 4, "max_tokens_per_micro_batch": 4096},
        "discriminator": {"warmup_steps": 0, "min_accuracy": 0.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | changes))

    def said(*arguments: str) -> str:
        command = [sys.executable, "-c", MEASURED, *arguments, str(tmp_path / "recipe.yaml")]
        # Freed memory is returned at once: glibc's fragments are a third of the rest, and vary.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout

    (estimate,) = json.loads(said("check", "--json").rsplit("RSS", 1)[0])["memory"]
    taken = int(said("train").rsplit("RSS", 1)[1])
    assert estimate["peak"] == pytest.approx(taken, rel=0.2), estimate["text"]
    assert taken > 2.5 * estimate["stays"]["process"], "otherwise the process would dominate"


def test_a_step_of_any_size_is_estimated(tmp_path: Path) -> None:
    """Only the rows of one micro-batch are listed, however many a step has."""
    save_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in letter_rows()))

    def update(**batching: int) -> int:
        recipe = {
            "model": {"model_name_or_path": str(tmp_path / "model")},
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "rollout": {"max_completion_length": 32},
            "batching": {"max_tokens_per_micro_batch": 400, **batching},
            "method": "grpo",
            "rewards": {"functions": ["no_comma"]},
        }
        (estimate,) = check_run(resolve(recipe))["memory"]
        return estimate["passes"]["update"]

    assert update(prompts_per_step=2_000_000_000, demonstrations_per_step=2_000_000_000) == update()

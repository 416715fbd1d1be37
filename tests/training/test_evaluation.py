"""In which steps and phases the full weights of the policy are gathered."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.runs import evaluated, recipe, train
from support.tiny import save_model
from uniapl.training import loop
from uniapl.training.distributed import fsdp
from uniapl.training.run import Run


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Step -> the phases in which the policy's full weights are gathered; step 0 is the start."""
    found: dict[int, list[str]] = {}
    running: list[Run] = []
    original, run_stage = fsdp.gathered, loop.run_stage

    @contextmanager
    def gathered(module: Any, sharded: Any) -> Iterator[None]:
        if type(module).__name__ != "ScoreModel":
            step = running[0].step if running else 0
            found.setdefault(step, []).append(running[0].view.current if running else "start")
        with original(module, sharded):
            yield

    monkeypatch.setattr(fsdp, "gathered", gathered)
    monkeypatch.setattr(
        "uniapl.training.api.run_stage", lambda run, stage: running.append(run) or run_stage(run, stage)
    )
    return found


def test_weights_are_gathered_only_where_they_are_used(
    model_dir: Path, tmp_path: Path, gathers: dict[int, list[str]]
) -> None:
    """SFT on four steps: evaluated in steps 2 and 4, saved in step 4, and the result is written."""
    values = recipe(model_dir, tmp_path / "run", method="sft", save_steps=4, **evaluated(tmp_path))
    train(values)
    assert gathers == {2: ["evaluate"], 4: ["evaluate", "save", "save"]}


@pytest.mark.parametrize("reference", ["start", "policy"])
def test_a_frozen_discriminator_gathers_only_what_it_reads(
    reference: str, model_dir: Path, tmp_path: Path, gathers: dict[int, list[str]]
) -> None:
    """The current policy's weights are gathered for sampling, and for scoring only if they score."""
    discriminator = {"kind": "density-ratio", "density_ratio_reference": reference}
    discriminator["model_name_or_path"] = str(save_model(tmp_path / "expert", seed=7))
    values = recipe(model_dir, tmp_path / "run", method="a-grpo", max_steps=1, discriminator=discriminator)
    train(values)
    assert gathers[0] == ["start", "rollout", *(["score"] if reference == "policy" else [])]

"""The budget and the steps in which methods spend it, by hand."""

from typing import Any

import pytest

from uniapl.compare.budget import Budget, budget_of, fit
from uniapl.config import Config
from uniapl.config.resolve import merge, resolve
from uniapl.errors import UsageError

SHAPE: dict[str, Any] = {
    "max_steps": 100,
    "rollout": {"num_generations": 8},
    "batching": {"prompts_per_step": 8, "demonstrations_per_step": 8},
}
BUDGET = Budget(rollouts=5120, demonstrations=1920)
"""That of uniapl: 20 steps with 64 demonstrations, then 80 steps with 64 rollouts and 8 demonstrations."""


def config(method: str, **changes: Any) -> Config:
    return resolve(merge({**SHAPE, "method": method}, changes)).config


def planned(*stages: Config, fraction: float = 1.0) -> list[tuple[int, int, int, int | None]]:
    """Steps, cold-start steps, demonstrations of a step, and of a cold-start step, of each stage."""
    found: list[tuple[int, int, int, int | None]] = []
    for length in fit(stages, BUDGET, fraction=fraction):
        batching = length["batching"]
        cold = batching.get("cold_start_demonstrations_per_step")
        found.append(
            (
                length["max_steps"],
                batching["cold_start_steps"],
                batching.get("demonstrations_per_step", 0),
                cold,
            )
        )
    return found


def test_the_budget_of_each_kind_of_method() -> None:
    assert budget_of([config("uniapl")]) == BUDGET
    assert budget_of([config("sft")]) == Budget(rollouts=0, demonstrations=800)
    assert budget_of([config("grpo")]) == Budget(rollouts=6400, demonstrations=0)
    assert budget_of([config("chord-mu")]) == Budget(rollouts=6400, demonstrations=800)
    # The discriminator of a-grpo reads demonstrations, but they are in no loss.
    assert budget_of([config("a-grpo")]) == Budget(rollouts=6400, demonstrations=0)
    assert budget_of([config("sft"), config("grpo")]) == Budget(rollouts=6400, demonstrations=800)
    cold = {"batching": {"cold_start_steps": 10, "cold_start_prompts_per_step": 2}}
    # 10 steps with 2 x 8 rollouts, 90 with 8 x 8.
    assert budget_of([config("uniapl", **cold)]).rollouts == 160 + 5760
    # At most one demonstration of each sampled prompt.
    gate = {"objective": {"mu_controller": "gate"}, "batching": {"cold_start_steps": 0}}
    assert budget_of([config("uniapl", **gate)]).demonstrations == 800


def test_without_rollouts_in_the_budget_steps_keep_their_size() -> None:
    """Preference pairs of the data need no rollouts."""
    share = Budget(rollouts=0, demonstrations=160)
    assert [(x["max_steps"], x["batching"]["demonstrations_per_step"]) for x in (
        *fit([config("dpo")], share), *fit([config("sft"), config("dpo")], share)
    )] == [(20, 8), (10, 8), (10, 8)]  # fmt: skip


def test_steps_and_demonstrations_of_each_method() -> None:
    assert planned(config("uniapl")) == [(100, 20, 8, 64)]
    assert planned(config("grpo")) == [(80, 0, 0, None)]
    assert planned(config("chord-mu")) == [(80, 0, 24, None)]
    assert planned(config("a-sft")) == [(80, 0, 24, None)]
    # 5,120 + 1,920 demonstrations, 64 in each step.
    assert planned(config("sft")) == [(110, 0, 64, None)]
    assert planned(config("sft"), fraction=0.5) == [(55, 0, 64, None)]


def test_stages_share_the_budget() -> None:
    assert planned(config("sft"), config("grpo")) == [(30, 0, 64, None), (80, 0, 0, None)]
    # Half of the rollouts each; only the first trains on demonstrations.
    assert planned(config("a-sft"), config("a-grpo")) == [(40, 0, 48, None), (40, 0, 0, None)]


def test_a_cold_start_shrinks_with_the_demonstrations() -> None:
    # Of 25 x 64 + 100 x 8 = 2,400 demonstrations, a third: 21 and then (800 - 25 x 21) / 100.
    (length,) = fit([config("uniapl")], Budget(rollouts=6400, demonstrations=800))
    assert length["max_steps"] == 125
    batching = {
        "cold_start_steps": 25,
        "cold_start_demonstrations_per_step": 21,
        "demonstrations_per_step": 3,
    }
    assert length["batching"] == batching
    assert budget_of([config("uniapl", max_steps=125, batching=batching)]) == Budget(
        rollouts=6400, demonstrations=825
    )


@pytest.mark.parametrize(
    ("methods", "budget", "message"),
    [
        (["uniapl"], Budget(rollouts=100, demonstrations=0), "'uniapl' trains on demonstrations"),
        (["sft", "grpo"], Budget(rollouts=100, demonstrations=0), "'sft' trains on demonstrations"),
        (["grpo"], Budget(rollouts=0, demonstrations=100), "'grpo' samples rollouts"),
    ],
)
def test_a_budget_without_what_a_method_needs(methods: list[str], budget: Budget, message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}.*--method uniapl"):
        fit([config(method) for method in methods], budget)


def test_sft_gets_demonstrations_in_place_of_rollouts() -> None:
    (length,) = fit([config("sft")], Budget(rollouts=640, demonstrations=0))
    assert (length["max_steps"], length["batching"]["demonstrations_per_step"]) == (10, 64)

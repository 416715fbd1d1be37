"""A step's metrics by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.runs import lines, recipe, train
from uniapl.config.objective import ObjectiveConfig
from uniapl.training.monitor.metrics import length_metrics, rollout_metrics
from uniapl.training.monitor.record import adversary_acts
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.credit import assign_credit
from uniapl.types import Example, Rollout, RolloutGroup


def group(
    rewards: tuple[float | None, ...], *, lengths: tuple[int, ...] | None = None, cut: int = 0
) -> RolloutGroup:
    """Rollouts of these lengths, the last `cut` of them truncated; each token has log-probability -0.5."""
    example = Example(
        row=1, prompt="p", prompt_ids=(5, 6), demonstration=None, demonstration_ids=None, columns={}
    )
    lengths = lengths or (1,) * len(rewards)
    return RolloutGroup(
        example=example,
        rollouts=tuple(
            Rollout(
                completion_ids=(7,) * length,
                sampling_logprobs=(-0.5,) * length,
                finish_reason="length" if i >= len(lengths) - cut else "stop",
                policy_version=3,
            )
            for i, length in enumerate(lengths)
        ),
        rewards=rewards,
        reward_parts={"f": rewards},
    )


def metrics(*groups: RolloutGroup) -> dict[str, Any]:
    objective = ObjectiveConfig(scale_rewards="none", adversarial_credit="logit")
    credits = assign_credit(groups, objective, expert_mean=None, lambda_adv=0.0)
    return rollout_metrics(groups, credits, objective, step=5)


@pytest.mark.parametrize(
    ("rewards", "logits", "loss", "reward", "multiply"),
    [
        ((1.0, 0.0), (0.5, -0.5), True, True, True),
        ((None, None), (0.5, -0.5), True, False, False),
        ((1.0, None), (None, -0.5), True, True, True),
        ((1.0, 0.0), (None, None), False, False, False),
        ((0.0, -1.0), (0.5, -0.5), True, True, False),
    ],
    ids=["both", "no reward", "another completion", "no logit", "nothing to multiply"],
)
def test_the_adversary_acts_where_it_can_change_something(
    rewards: tuple[float | None, ...],
    logits: tuple[float | None, ...],
    loss: bool,
    reward: bool,
    multiply: bool,
) -> None:
    """A group, next to one with rewards only."""
    finite = tuple(math.nan if logit is None else logit for logit in logits)
    scored = replace(group(rewards), policy_logits=finite, expert_logit=0.0)
    for placement, expected in (("loss", loss), ("reward", reward), ("multiply", multiply)):
        objective = ObjectiveConfig.model_validate({"adversarial_placement": placement})
        for weight in (2.0, 0.0):
            credits = assign_credit(
                [group((1.0, 0.0)), scored], objective, expert_mean=None, lambda_adv=weight
            )
            weights = {"adv": weight if placement == "loss" else 0.0}
            batch = MixedBatch(rows=(), micro_batches=(), weights=weights, credits=credits, lambda_adv=weight)
            assert adversary_acts(batch) == (expected and weight > 0), placement


@pytest.mark.case(23)
def test_standard_deviations_are_over_all_rewards_and_unbiased() -> None:
    found = metrics(group((1.0,) * 4), group((0.0,) * 4))
    # Sum of squares 8 * 0.25, divided by 7.
    assert found["reward_std"] == found["rewards/f/std"] == pytest.approx(math.sqrt(2 / 7))
    assert found["frac_reward_zero_std"] == 1
    assert found["groups/mixed"] == 0


def test_unknown_rewards_are_not_zero() -> None:
    found = metrics(group((1.0, None, 0.0, 1.0)), group((None,) * 4), group((0.5, 0.5, None, None)))
    assert found["reward"] == pytest.approx(3 / 5)
    assert found["reward_std"] == pytest.approx(math.sqrt((2 * 0.4**2 + 0.6**2 + 2 * 0.1**2) / 4))
    assert found["frac_reward_zero_std"] == pytest.approx(1 / 3), "of all groups, as in TRL"
    assert found["groups/mixed"] == 0.5, "of the groups with a reward"
    nothing = metrics(group((None, None)))
    assert nothing["reward_std"] is nothing["rewards/f/std"] is nothing["frac_reward_zero_std"] is None
    one = metrics(group((1.0, None)))
    assert one["reward_std"] is None, "one reward has no standard deviation"
    assert one["frac_reward_zero_std"] == 0


def test_lengths_of_terminated_completions() -> None:
    found = metrics(group((0.0,) * 3, lengths=(2, 5, 8), cut=1))
    names = ("mean_length", "min_length", "max_length", "clipped_ratio")
    assert [found[f"completions/{name}"] for name in names] == [5, 2, 8, pytest.approx(1 / 3)]
    ended = ("mean_terminated_length", "min_terminated_length", "max_terminated_length")
    assert [found[f"completions/{name}"] for name in ended] == [3.5, 2, 5]
    none = metrics(group((0.0,) * 2, cut=2))
    assert [none[f"completions/{name}"] for name in ended] == [None, None, None]


def test_lengths_and_the_entropy_of_trajectories_are_those_of_written_tokens() -> None:
    """The results of tools have no length; a log-probability of -0.5 nats each is the policy's."""
    plain = group((0.0, 1.0), lengths=(4, 2))
    first = replace(plain.rollouts[0], completion_ids=(7,) * 9, given=((1, 4), (6, 8)))
    example = replace(plain.example, demonstration_ids=(7,) * 12, demonstration_given=((2, 11),))
    trajectories = replace(plain, example=example, rollouts=(first, plain.rollouts[1]))
    assert metrics(trajectories) == metrics(plain)
    assert metrics(trajectories)["completions/max_length"] == 4
    found = length_metrics([trajectories])
    assert found == {"completions/length_ratio": (4 + 2) / (3 + 3), "completions/length_auc": 0.5}
    assert trajectories.completion_tokens == 6


def test_the_entropy_is_known_without_a_gradient(model_dir: Path, tmp_path: Path) -> None:
    """Equal rewards give no gradient, so the update computes no rollout; a collapse must still be seen."""
    assert metrics(group((1.0, 1.0), lengths=(3, 1)))["rollout/entropy_estimate"] == 0.5
    health = {"window": 2, "min_entropy": 100.0}
    values = recipe(model_dir, tmp_path / "run", method="grpo", max_steps=2, health=health)
    values["objective"] = {"beta": 0.0}
    train(values, reward_functions=[lambda completions: [1.0] * len(completions)])
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(record["trained/entropy"] is None for record in records)
    assert records[1]["health/entropy_collapse"] == 1


def test_tokens_include_prompts_and_add_up(model_dir: Path, tmp_path: Path) -> None:
    """TRL counts the prompt of every rollout and demonstration."""
    train(recipe(model_dir, tmp_path / "run", max_steps=2))
    records = lines(tmp_path / "run" / "metrics.jsonl")
    completions = [record["tokens/sft"] + record["tokens/rollout"] for record in records]
    assert records[0]["num_tokens"] > completions[0]
    assert records[1]["num_tokens"] > records[0]["num_tokens"] + completions[1]

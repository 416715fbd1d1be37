"""Advantages and rows from rewards and logits; unknown values are left out."""

import math
from dataclasses import replace

import pytest

from support import reference
from uniapl.config.objective import ObjectiveConfig
from uniapl.data.batching import completion_counts, component_counts
from uniapl.training.monitor.metrics import length_metrics, pair_metrics, rollout_metrics
from uniapl.training.update.credit import (
    assign_credit,
    failed_groups,
    groups_without_advantage,
    known_passing,
    passing,
    rollout_rows,
)
from uniapl.types import Example, Rollout, RolloutGroup

UNSCALED = ObjectiveConfig(scale_rewards="none")


def group(
    rewards: tuple[float | None, ...],
    policy_logits: tuple[float, ...] | None = None,
    expert_logit: float | None = None,
) -> RolloutGroup:
    example = Example(
        row=1, prompt="p", prompt_ids=(5, 6), demonstration=None, demonstration_ids=None, columns={}
    )
    rollouts = tuple(
        Rollout(
            completion_ids=(7,) * (n + 1),
            sampling_logprobs=(-1.0,) * (n + 1),
            finish_reason="stop",
            policy_version=0,
        )
        for n in range(len(rewards))
    )
    return RolloutGroup(
        example=example,
        rollouts=rollouts,
        texts=("",) * len(rewards),
        rewards=rewards,
        reward_parts={},
        policy_logits=policy_logits,
        expert_logit=expert_logit,
    )


def credit(item: RolloutGroup, expert_mean: float | None = None):
    return assign_credit([item], UNSCALED, expert_mean=expert_mean, lambda_adv=0.0)[0]


def test_by_hand() -> None:
    got = credit(group((1.0, 0.0, None), (0.0, 1.0, 2.0), 1.0))
    assert got.advantages == (0.5, -0.5, None)
    wins = [reference.sigmoid(x - 1.0) for x in (0.0, 1.0, 2.0)]
    assert got.win_rates == pytest.approx(wins)
    assert got.adversarial_advantages == pytest.approx([u - sum(wins) / 3 for u in wins])


def test_rewards_are_scaled_and_credit_is_chosen_as_configured() -> None:
    item = group((1.0, 0.0, None), (0.0, 1.0, 2.0), 1.0)
    logits = ObjectiveConfig(adversarial_credit="logit")
    (scaled,) = assign_credit([item], logits, expert_mean=None, lambda_adv=0.0)
    assert scaled.advantages == (
        *(pytest.approx(sign * 0.5 / (math.sqrt(0.5) + 1e-4)) for sign in (1, -1)),
        None,
    )
    assert scaled.adversarial_advantages == pytest.approx((-1.0, 0.0, 1.0))


def test_in_the_reward_the_adversary_s_credit_is_added_where_both_are_known() -> None:
    item = group((1.0, 0.0, None), (0.0, 1.0, 2.0), 1.0)
    apart = credit(item)
    in_reward = UNSCALED.model_copy(update={"adversarial_placement": "reward"})
    (inside,) = assign_credit([item], in_reward, expert_mean=None, lambda_adv=0.25)
    # The group's mean of u is over all three, also over the one whose reward is not known.
    wins = [reference.sigmoid(x - 1.0) for x in (0.0, 1.0, 2.0)]
    mean = sum(wins) / 3
    assert inside.advantages[0] == pytest.approx(0.5 + 0.25 * (wins[0] - mean))
    assert inside.advantages[1] == pytest.approx(-0.5 + 0.25 * (wins[1] - mean))
    assert inside.advantages[2] is None
    assert inside.adversarial_advantages == apart.adversarial_advantages
    without_logits = group((1.0, 0.0))
    (inside,) = assign_credit([without_logits], in_reward, expert_mean=None, lambda_adv=0.25)
    assert inside.advantages == (0.5, -0.5)


def test_a_prompt_without_demonstration_uses_the_running_mean() -> None:
    assert credit(group((None, None), (0.0, 0.0)), expert_mean=2.0).win_rates == pytest.approx(
        [reference.sigmoid(-2.0)] * 2
    )
    own = credit(group((None, None), (0.0, 0.0), 1.0), expert_mean=2.0)
    assert own.win_rates == pytest.approx([reference.sigmoid(-1.0)] * 2), "its own demonstration comes first"
    nothing = credit(group((None, None), (0.0, 0.0)))
    assert nothing.win_rates == nothing.adversarial_advantages == (None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_not_known(bad: float) -> None:
    got = credit(group((1.0, 0.0, 0.0), (0.0, bad, 1.0), 0.0))
    assert got.win_rates[1] is None
    wins = [0.5, reference.sigmoid(1.0)]
    assert got.win_rates[::2] == pytest.approx(wins)
    assert got.adversarial_advantages[0] == pytest.approx(0.5 - sum(wins) / 2)
    assert credit(group((1.0, 0.0), (0.0, 0.0), bad)).win_rates == (None, None)


def test_a_row_has_the_components_whose_advantage_is_known() -> None:
    groups = [group((1.0, None), (0.0, 1.0), 0.0), group((1.0, 0.0))]
    credits = [credit(item) for item in groups]
    rows = rollout_rows(groups, credits, temperature=0.7)
    assert [row.components for row in rows] == [
        {"kl", "rl", "adv"},
        {"kl", "adv"},
        {"kl", "rl"},
        {"kl", "rl"},
    ]
    assert {row.temperature for row in rows} == {0.7}
    assert [row.advantage for row in rows] == [0.0, 0.0, 0.5, -0.5]
    wins = [0.5, reference.sigmoid(1.0)]
    expected = [u - sum(wins) / 2 for u in wins]
    assert [row.adversarial_advantage for row in rows[:2]] == pytest.approx(expected)
    assert component_counts(rows) == {"sft": 0, "rl": 1 + 1 + 2, "adv": 1 + 2, "kl": 6}
    unrewarded = [c.without_rewards() for c in credits]
    components = [row.components for row in rollout_rows(groups, unrewarded, temperature=0.7)]
    assert components == [{"kl", "adv"}, {"kl", "adv"}, {"kl"}, {"kl"}]


def test_masked_truncated_completions_enter_no_component() -> None:
    """Their rewards and logits still count in the means of their group."""
    item = group((1.0, 0.0, 0.5), (0.0, 1.0, 2.0), 0.0)
    cut = replace(item.rollouts[1], finish_reason="length")
    item = replace(item, rollouts=(item.rollouts[0], cut, item.rollouts[2]))
    credits = [credit(item)]
    rows = rollout_rows([item], credits, temperature=1.0, mask_truncated=True)
    assert [row.components for row in rows] == [{"kl", "rl", "adv"}, set(), {"kl", "rl", "adv"}]
    assert [row.advantage for row in rows] == [0.5, -0.5, 0.0]
    assert component_counts(rows) == {"sft": 0, "rl": 1 + 3, "adv": 1 + 3, "kl": 1 + 3}
    assert completion_counts(rows) == {"sft": 0, "rl": 2, "adv": 2, "kl": 2, "pref": 0}
    weights = {"sft": 1.0, "rl": 1.0, "adv": 1.0, "kl": 0.1, "entropy": -0.1}
    assert [row.has_gradient(weights) for row in rows] == [True, False, True]
    kept = rollout_rows([item], credits, temperature=1.0)
    assert [row.components for row in kept] == [{"kl", "rl", "adv"}] * 3


def test_an_entropy_bonus_gives_a_row_without_advantage_a_gradient() -> None:
    item = group((1.0, 1.0))
    rows = rollout_rows([item], [credit(item)], temperature=1.0)
    weights = {"sft": 1.0, "rl": 1.0, "adv": 0.0, "kl": 0.0}
    assert [row.has_gradient(weights | {"entropy": c}) for c in (-0.1, -0.0) for row in rows] == [
        *(True, True),
        *(False, False),
    ]


def test_batch_scaling_is_over_all_groups_of_the_step() -> None:
    """Rewards 1, 0, 3, 3 and an unknown one, in groups of two and three."""
    objective = ObjectiveConfig(scale_rewards="batch")
    groups = [group((1.0, 0.0)), group((3.0, None, 3.0))]
    first, second = assign_credit(groups, objective, expert_mean=None, lambda_adv=0.0)
    std = math.sqrt(27 / 4 / 3) + 1e-4
    assert first.advantages == pytest.approx((0.5 / std, -0.5 / std))
    assert second.advantages == (0.0, None, 0.0)


def parted(**parts: tuple[float | None, ...]) -> RolloutGroup:
    """A group whose rewards are the sums of the parts; unknown where a part named "failed" is."""
    rewards = tuple(
        None
        if all(v is None for v in values) or ("failed" in parts and parts["failed"][i] is None)
        else sum(v for v in values if v is not None)
        for i, values in enumerate(zip(*parts.values(), strict=True))
    )
    return replace(group(rewards), reward_parts=parts)


def test_decoupled_rewards_by_the_weights_of_their_functions() -> None:
    """The second function applies to one group; where a function failed, no other part counts either."""
    nothing = (None, None, None)
    groups = [
        parted(right=(1.0, 0.0, 0.0), failed=(10.0, 30.0, 20.0)),
        parted(right=(1.0, 0.0, 5.0), failed=(0.0, 8.0, None)),
        replace(parted(right=(0.0, 1.0, 1.0)), reward_parts={"right": (0.0, 1.0, 1.0), "failed": nothing}),
    ]
    objective = ObjectiveConfig(multi_objective_aggregation="normalize_then_sum")
    weights = {"right": 1.0, "failed": -2.0}
    credits = assign_credit(groups, objective, expert_mean=None, lambda_adv=0.0, reward_weights=weights)
    right = [[1.0, 0.0, 0.0], [1.0, 0.0, None], [0.0, 1.0, 1.0]]
    failed = [[10.0, 30.0, 20.0], [0.0, 8.0, None], [None] * 3]
    expected = reference.decoupled_advantages([right, failed], [1.0, -2.0])
    for got, want in zip(credits, expected, strict=True):
        assert [v or 0.0 for v in got.advantages] == pytest.approx(want)
    assert credits[1].advantages[2] is None


def test_decoupled_rewards_are_multiplied_one_by_one() -> None:
    """The weighted rewards: a positive one is multiplied by u, a penalty is not."""
    item = parted(right=(1.0, 0.5, 0.0), length=(3.0, 1.0, 2.0))
    item = replace(item, rewards=(1 - 0.3, 0.5 - 0.1, -0.2), policy_logits=(0.0, 1.0, 2.0), expert_logit=0.0)
    objective = ObjectiveConfig(
        multi_objective_aggregation="normalize_then_sum", adversarial_placement="multiply"
    )
    weights = {"right": 2.0, "length": -0.1}
    (got,) = assign_credit([item], objective, expert_mean=None, lambda_adv=1.0, reward_weights=weights)
    # Only the first passes; the second keeps at most half.
    right = [1.0 * reference.sigmoid(0.0), 0.5 * 0.5, 0.0]
    expected = reference.decoupled_advantages([[right], [[3.0, 1.0, 2.0]]], [2.0, -0.1])
    assert got.advantages == pytest.approx(expected[0])
    assert got.reward_changes == pytest.approx((2.0 * 0.5, 2.0 * 0.25, 0.0))


def test_accuracy_counts_a_tie_as_half() -> None:
    """A discriminator with constant logits has accuracy 0.5, not 0."""
    pairs = pair_metrics([group((None, None, None), (0.0, 1.0, 2.0), 1.0), group((None,), (5.0,))])
    wins = [reference.sigmoid(-1.0), 0.5, reference.sigmoid(1.0)]
    assert pairs == {
        "discriminator/accuracy": 0.5,
        "discriminator/margin": 0.0,
        "discriminator/pair_win_rate": pytest.approx(sum(wins) / 3),
    }


def test_pairs_with_a_logit_that_is_not_finite_are_left_out() -> None:
    nan = float("nan")
    pairs = pair_metrics([group((None, None), (0.0, nan), 1.0), group((None,), (5.0,), nan)])
    assert pairs == {
        "discriminator/accuracy": 1.0,
        "discriminator/margin": 1.0,
        "discriminator/pair_win_rate": pytest.approx(reference.sigmoid(-1.0)),
    }


def test_lengths_beside_the_demonstrations() -> None:
    """Rollouts of 1, 2 and 3 tokens; one demonstration of 2 tokens, one of 4, and a prompt without."""

    def beside(tokens: int) -> RolloutGroup:
        item = group((None, None, None))
        return replace(item, example=replace(item.example, demonstration_ids=(9,) * tokens))

    lengths = length_metrics([beside(2), beside(4), group((None,))])
    assert lengths == {
        "completions/length_ratio": pytest.approx(12 / 18),
        "completions/length_auc": pytest.approx((1 + 0.5) / 6),
    }
    assert length_metrics([group((None,))]) == {}


def test_the_first_function_that_applies_decides_whether_a_completion_passes() -> None:
    """To the prompt: a verifier that failed on one of its completions leaves no other to decide."""
    parts = {"math": (None, None, None), "code": (1.0, None, 0.5), "length": (1.0, 1.0, 1.0)}
    item = replace(group(rewards=(1.0, 1.0, 0.5)), reward_parts=parts)
    assert passing(item, ObjectiveConfig()) == (True, False, False)
    assert passing(item, ObjectiveConfig(pass_reward="length")) == (True, True, True)
    assert passing(item, ObjectiveConfig(pass_reward="math")) == (False, False, False)
    assert passing(replace(item, reward_parts={}), ObjectiveConfig()) == (True, True, False)
    assert known_passing(item, ObjectiveConfig()) == [True, False], "a failed call decides nothing"
    assert known_passing(item, ObjectiveConfig(pass_reward="math")) == []


def test_groups_that_dynamic_sampling_replaces() -> None:
    """Those with known rewards, all equal up to rounding."""
    groups = [
        group((0.0, 0.0, 0.0)),
        group((0.3, 0.1 + 0.2, None)),
        group((1.0, None, None)),
        group((1.0, 0.0, 1.0)),
        group((None, None, None)),
        group((-1.0, -1.0, -1.0), (0.0, 1.0, 2.0), 1.0),
    ]
    equal = [groups[n] for n in (0, 1, 2, 5)]
    for scale in ("none", "group", "batch"):
        assert groups_without_advantage(groups, ObjectiveConfig(scale_rewards=scale), {}) == equal
    assert groups_without_advantage([], ObjectiveConfig(), {}) == []


def test_dynamic_sampling_keeps_functions_that_cancel_only_in_their_sum() -> None:
    """With `normalize_then_sum`, functions of different weight leave an advantage at equal sums."""
    item = replace(group((2.0, 2.0, 2.0)), reward_parts={"right": (2.0, 0.0, 0.0), "brief": (0.0, 1.0, 1.0)})
    weights = {"right": 1.0, "brief": 2.0}
    assert groups_without_advantage([item], ObjectiveConfig(), weights) == [item]
    gdpo = ObjectiveConfig(multi_objective_aggregation="normalize_then_sum")
    assert groups_without_advantage([item], gdpo, weights) == []


def test_a_prompt_fails_when_no_known_reward_is_above_the_threshold() -> None:
    def of(rewards: tuple[float | None, ...], *, demonstration: bool = True) -> RolloutGroup:
        item = group(rewards)
        return replace(item, example=replace(item.example, demonstration_ids=(9,) if demonstration else None))

    groups = [
        of((0.0, 0.0)),
        of((0.0, 0.5)),
        of((None, 0.0)),
        of((None, None)),
        of((0.0, 0.0), demonstration=False),
    ]
    assert failed_groups(groups, 0.0) == [groups[0], groups[2]]
    assert failed_groups(groups, 0.5) == [groups[0], groups[1], groups[2]]


ROUNDED = (0.6 + 0.3 + 0.1, 0.1 + 0.3 + 0.6)
"""One reward of 1 in two orders of addition."""


@pytest.mark.case(22)
def test_rounding_is_neither_a_failed_pass_nor_a_mixed_group() -> None:
    assert ROUNDED[0] < ROUNDED[1] == 1.0
    perfect, none = group(ROUNDED * 2), group((0.0, 0.1 + 0.2 - 0.3, -1e-17, None))
    mixed = group((ROUNDED[0], 0.0, 0.5, ROUNDED[1]))
    groups = [perfect, none, mixed]
    assert credit(perfect).advantages == (0.0,) * 4
    got = rollout_metrics(groups, [credit(one) for one in groups], ObjectiveConfig(), step=0)
    assert got["pass_rate"] == 6 / 11
    assert got["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert got["groups/mixed"] == pytest.approx(1 / 3)
    assert (got["groups/all_good"], got["groups/all_bad"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    alone = rollout_metrics([perfect], [credit(perfect)], ObjectiveConfig(), step=0)
    assert (alone["pass_rate"], alone["groups/all_good"]) == (1.0, None)


def test_the_gate_compares_up_to_rounding() -> None:
    example = replace(group(ROUNDED).example, demonstration_ids=(5,))
    groups = [replace(group((value, 0.0)), example=example) for value in (*ROUNDED, 1.01)]
    for threshold in ROUNDED:
        assert failed_groups(groups, threshold) == groups[:2]

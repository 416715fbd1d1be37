"""The multiplied reward: advantages against plain Python, for unknown, equal and failing rewards."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import reference
from uniapl.config.objective import ObjectiveConfig
from uniapl.training.update.credit import assign_credit, passing
from uniapl.types import Example, Rollout, RolloutGroup

MULTIPLY = ObjectiveConfig(adversarial_placement="multiply")
EXAMPLE = Example(
    row=1, prompt="p", prompt_ids=(5, 6), demonstration=None, demonstration_ids=None, columns={}
)


def group(
    rewards: list[float | None],
    logits: list[float] | None = None,
    *,
    expert: float | None = 0.0,
    parts: dict[str, list[float | None]] | None = None,
) -> RolloutGroup:
    rollout = Rollout(
        completion_ids=(7, 1), sampling_logprobs=(-1.0, -1.0), finish_reason="stop", policy_version=0
    )
    return RolloutGroup(
        example=EXAMPLE,
        rollouts=(rollout,) * len(rewards),
        texts=("",) * len(rewards),
        rewards=tuple(rewards),
        reward_parts={name: tuple(values) for name, values in (parts or {"check": rewards}).items()},
        policy_logits=None if logits is None else tuple(logits),
        expert_logit=expert,
    )


def advantages(item: RolloutGroup, *, exponent: float = 1.0, objective: ObjectiveConfig = MULTIPLY):
    return assign_credit([item], objective, expert_mean=None, lambda_adv=exponent)[0].advantages


def slow(
    rewards: list[float | None],
    logits: list[float],
    expert: float,
    passes: list[bool],
    exponent: float,
    scale: str,
) -> list[float | None]:
    """The definition in loops: r u^c, at most half where the verifier fails, then the normalization."""
    multiplied: list[float | None] = []
    for r, logit, accepted in zip(rewards, logits, passes, strict=True):
        if r is None:
            multiplied.append(None)
            continue
        factor = reference.sigmoid(logit - expert) ** exponent
        if not accepted:
            factor = min(factor, 0.5)
        multiplied.append(r * factor if r > 0 else r)
    known = [r for r in multiplied if r is not None]
    if not known or max(known) == min(known):
        return [None if r is None else 0.0 for r in multiplied]
    mean = sum(known) / len(known)
    divisor = 1.0
    if scale == "group":
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1))
        all_pass = all(accepted for r, accepted in zip(rewards, passes, strict=True) if r is not None)
        divisor = (max(std, 0.5) if all_pass else std) + 1e-4
    return [None if r is None else (r - mean) / divisor for r in multiplied]


REWARD = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.5]))


@given(
    st.lists(st.tuples(REWARD, st.floats(-4, 4)), min_size=2, max_size=6),
    st.floats(-2, 2),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(["group", "none"]),
)
def test_equals_plain_python(
    rows: list[tuple[float | None, float]], expert: float, c: float, scale: str
) -> None:
    rewards, logits = [r for r, _ in rows], [x for _, x in rows]
    objective = MULTIPLY.model_copy(update={"scale_rewards": scale})
    got = advantages(group(rewards, logits, expert=expert), exponent=c, objective=objective)
    expected = slow(rewards, logits, expert, [r is not None and r >= 1 for r in rewards], c, scale)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-9))


def test_small_differences_stay_small_where_all_pass() -> None:
    """u of 0.52 and 0.48: a difference of 0.04, which the group's own deviation would raise to 1.41."""
    logit = math.log(0.52 / 0.48)
    got = advantages(group([1.0, 1.0], [logit, -logit]))
    assert got == pytest.approx([0.02 / 0.5001, -0.02 / 0.5001])
    mixed = advantages(group([1.0, 0.0], [logit, -logit]))
    assert mixed == pytest.approx([0.26 / (0.52 / math.sqrt(2) + 1e-4), -0.26 / (0.52 / math.sqrt(2) + 1e-4)])


def test_nobody_passes() -> None:
    """All keep at most half, so that a likely failing completion is not preferred to an even one."""
    got = advantages(group([0.5, 0.5, 0.0], [4.0, 0.0, 0.0]))
    assert got[0] == got[1]
    assert got[0] is not None
    assert got[0] > 0


def test_the_verifier_decides_and_not_the_sum() -> None:
    parts: dict[str, list[float | None]] = {"check": [1.0, 0.5, None], "length": [0.0, 0.9, 0.9]}
    item = group([1.0, 1.4, 0.9], parts=parts)
    assert passing(item, MULTIPLY) == (True, False, False)
    assert passing(item, MULTIPLY.model_copy(update={"pass_threshold": 0.5})) == (True, True, False)
    named = MULTIPLY.model_copy(update={"pass_reward": "length", "pass_threshold": 0.9})
    assert passing(item, named) == (False, True, True)
    rounded = group([1.0], parts={"check": [0.6 + 0.3 + 0.1]})
    assert passing(rounded, MULTIPLY) == (True,)


def test_without_logits_or_weight_nothing_changes() -> None:
    plain = advantages(group([1.0, 0.0, 1.0], [1.0, 2.0, 3.0]), exponent=0.0)
    assert advantages(group([1.0, 0.0, 1.0])) == plain
    assert advantages(group([1.0, 0.0, 1.0], [1.0, 2.0, 3.0], expert=None)) == plain
    nan = float("nan")
    half = advantages(group([1.0, 1.0, 0.0], [nan, 0.0, 0.0]))
    assert half[0] == half[1], "without a logit, u is 1/2"


def test_the_changes_are_reported() -> None:
    (credit,) = assign_credit(
        [group([1.0, 0.5, None], [0.0, 0.0, 0.0])], MULTIPLY, expert_mean=None, lambda_adv=1.0
    )
    assert credit.reward_changes == pytest.approx((0.5, 0.25))
    assert credit.advantage_changes == pytest.approx((0.0, 0.0), abs=1e-3)
    (plain,) = assign_credit([group([1.0, 0.5])], MULTIPLY, expert_mean=None, lambda_adv=1.0)
    assert plain.reward_changes == ()

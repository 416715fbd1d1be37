"""The task's reward functions as a sieve for answers."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from uniapl.collect.rows import Demonstration, Question
from uniapl.config import RewardsConfig
from uniapl.errors import UsageError
from uniapl.rewards.base import Rewarder, build_rewarder
from uniapl.types import Example

AT_ONCE = 256
"""Answers that a function is given in one call."""


def prepare(
    names: Sequence[str], questions: Sequence[Question], *, allow_code: bool
) -> tuple[Rewarder, list[str]]:
    """The functions, tried on the rows before anything is asked; and what the user should hear.

    Raises:
        UsageError: There is no such function, or it cannot score these rows.
    """
    rewarder = build_rewarder(RewardsConfig.model_validate({"functions": list(names)}))
    for reward in rewarder.rewards:
        if "completion_ids" in inspect.signature(reward.function.func).parameters:
            raise UsageError(
                f"reward function '{reward.name}' reads completion_ids, and an endpoint gives no token ids: "
                "leave it out of --rewards"
            )
    examples = [_example(question) for question in questions]
    rewarder.check_columns(examples)
    notes = rewarder.check_rows(examples, allow_code=allow_code)
    rewarder.try_out(examples)
    return rewarder, notes


def score(
    demonstrations: Sequence[Demonstration], rewarder: Rewarder
) -> tuple[list[Demonstration], list[str]]:
    """The same with their rewards (or None) in `source`; and the first failure of each function."""
    scored: list[Demonstration] = []
    failures: dict[str, str] = {}
    for start in range(0, len(demonstrations), AT_ONCE):
        some = demonstrations[start : start + AT_ONCE]
        examples, texts = [_example(one.question) for one in some], [one.completion for one in some]
        outcomes = rewarder.score(examples, texts, [[] for _ in some])
        for name, outcome in outcomes.items():
            if outcome.message is not None:
                failures.setdefault(name, f"reward '{name}': {outcome.message}")
        rewards = rewarder.combine(outcomes, len(some))
        scored += [
            replace(one, source={**one.source, "reward": reward})
            for one, reward in zip(some, rewards, strict=True)
        ]
    return scored, list(failures.values())


def select(
    scored: Sequence[Demonstration], *, min_reward: float | None, best_of_n: bool
) -> tuple[list[Demonstration], dict[str, list[int]]]:
    """Those good enough, or the first of the best of each prompt; and reason -> rows of the others."""
    best: dict[int, float] = {}
    kept: list[Demonstration] = []
    dropped: dict[str, list[int]] = {}
    for one in scored:
        row, reward = one.question.row, one.source["reward"]
        if reward is None:
            dropped.setdefault("without a reward", []).append(row)
        elif min_reward is not None and reward < min_reward:
            dropped.setdefault(f"reward below {min_reward:g}", []).append(row)
        else:
            kept.append(one)
            best[row] = max(reward, best.get(row, reward))
    if not best_of_n:
        return kept, dropped
    first: dict[int, Demonstration] = {}
    for one in kept:
        if one.source["reward"] == best[one.question.row]:
            first.setdefault(one.question.row, one)
    beaten = [one.question.row for one in kept if first[one.question.row] is not one]
    return list(first.values()), dropped | ({"not the best of their prompt": beaten} if beaten else {})


def _example(question: Question) -> Example:
    """What reward functions see of a row, as in training."""
    columns = {key: value for key, value in question.columns.items() if value is not None}
    return Example(
        row=question.row,
        prompt=question.prompt,
        prompt_ids=(),
        demonstration=None,
        demonstration_ids=None,
        columns=columns,
    )

"""Score collected completions with reward functions, and select the best."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace

from uniapl.collect.rows import Demonstration, PromptRow
from uniapl.config import RewardsConfig
from uniapl.errors import UsageError
from uniapl.rewards.base import Rewarder, build_rewarder
from uniapl.tolerance import at_least, same
from uniapl.types import Example

BATCH_SIZE = 256
"""Completions that a reward function scores in one call."""


def load_rewarder(
    names: Sequence[str], rows: Sequence[PromptRow], *, allow_code: bool
) -> tuple[Rewarder, list[str]]:
    """The reward functions, tried on the rows before any request is sent; and notes for the user.

    Raises:
        UsageError: A function does not exist, or cannot score these rows.
    """
    rewarder = build_rewarder(RewardsConfig.model_validate({"functions": list(names)}))
    for reward in rewarder.rewards:
        if "completion_ids" in inspect.signature(reward.function.func).parameters:
            raise UsageError(
                f"reward function '{reward.name}' needs completion_ids, but endpoints return no token ids: "
                "remove it from --rewards"
            )
    examples = [_example(row) for row in rows]
    rewarder.check_columns(examples)
    notes = rewarder.check_rows(examples, allow_code=allow_code)
    rewarder.try_out(examples)
    return rewarder, notes


def score(
    demonstrations: Sequence[Demonstration], rewarder: Rewarder
) -> tuple[list[Demonstration], list[str]]:
    """The demonstrations with their rewards (or None) in `source`, and the first error of each function."""
    scored: list[Demonstration] = []
    errors: dict[str, str] = {}
    for start in range(0, len(demonstrations), BATCH_SIZE):
        batch = demonstrations[start : start + BATCH_SIZE]
        examples, texts = [_example(one.row) for one in batch], [one.completion for one in batch]
        outcomes = rewarder.score(examples, texts, [[] for _ in batch])
        for name, outcome in outcomes.items():
            if outcome.message is not None:
                errors.setdefault(name, f"reward '{name}': {outcome.message}")
        rewards = rewarder.combine(outcomes, len(batch))
        scored += [
            replace(one, source={**one.source, "reward": reward})
            for one, reward in zip(batch, rewards, strict=True)
        ]
    return scored, list(errors.values())


def select(
    scored: Sequence[Demonstration], *, min_reward: float | None, best_of_n: bool
) -> tuple[list[Demonstration], dict[str, list[int]]]:
    """The demonstrations to keep, and the row numbers of the others by the reason for dropping them."""
    kept: list[Demonstration] = []
    best: dict[int, Demonstration] = {}
    dropped: dict[str, list[int]] = {}
    for one in scored:
        number, reward = one.row.number, one.source["reward"]
        if reward is None:
            dropped.setdefault("without a reward", []).append(number)
        elif min_reward is not None and not at_least(reward, min_reward):
            dropped.setdefault(f"reward below {min_reward:g}", []).append(number)
        else:
            kept.append(one)
            best_reward = best[number].source["reward"] if number in best else -math.inf
            if reward > best_reward and not same(reward, best_reward):
                best[number] = one
    if not best_of_n:
        return kept, dropped
    if worse := [one.row.number for one in kept if best[one.row.number] is not one]:
        dropped["not the best of their prompt"] = worse
    return list(best.values()), dropped


def _example(row: PromptRow) -> Example:
    """The row as reward functions get it in training."""
    return Example(
        row=row.number,
        prompt=row.prompt,
        prompt_ids=(),
        demonstration=None,
        demonstration_ids=None,
        columns={key: value for key, value in row.columns.items() if value is not None},
    )

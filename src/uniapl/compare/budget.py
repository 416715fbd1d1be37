"""The budget of a comparison, in rollouts and demonstrations, and the steps in which each method spends it.

The budget is what the steps of the recipe contain with the recipe's own method, repetitions counted. A method
without rollouts gets as many demonstrations in their place; a method without demonstrations gets none. The
stages of a pipeline share rollouts and demonstrations equally. Tokens, FLOPs and seconds depend on the
method: they are counted and reported.

Rollouts that are sampled and replaced (`rollout.max_resample_times`) count: such a stage ends early, when it
has sampled its part of the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uniapl.config import Config
from uniapl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Numbers of completions.

    Example:
        Budget(rollouts=5120, demonstrations=1920): 80 steps with 64 rollouts and 8 demonstrations, after 20
        steps with 64 demonstrations.
    """

    rollouts: int
    demonstrations: int
    """Demonstrations in the losses; those that only the discriminator reads do not count."""

    def __add__(self, other: "Budget") -> "Budget":
        return Budget(
            rollouts=self.rollouts + other.rollouts,
            demonstrations=self.demonstrations + other.demonstrations,
        )


def budget_of(stages: Sequence[Config]) -> Budget:
    """What the steps of all stages contain, with mu_controller gate at most."""
    return sum(map(_contents, stages), start=Budget(rollouts=0, demonstrations=0))


def _contents(config: Config) -> Budget:
    objective, batching = config.objective, config.batching
    cold = min(config.cold_start_steps, config.max_steps)
    rest = config.max_steps - cold
    rollouts = demonstrations = 0
    if objective.uses_rollouts:
        prompts = rest * batching.prompts_per_step + cold * batching.cold_start_prompts_per_step
        rollouts = prompts * config.rollout.num_generations
    if objective.mu_peak > 0:
        demonstrations += cold * _cold_demonstrations(config)
    if objective.learns_from_demonstrations:
        # The gate trains on the demonstrations of prompts that fail, at most those of all prompts.
        gated = objective.mu_controller == "gate"
        demonstrations += rest * (batching.prompts_per_step if gated else batching.demonstrations_per_step)
    return Budget(rollouts=rollouts, demonstrations=demonstrations)


def fit(stages: Sequence[Config], budget: Budget, *, fraction: float = 1.0) -> list[dict[str, Any]]:
    """For each stage the keys `max_steps` and `batching` with which all stages together use the budget.

    Numbers of steps and of demonstrations per step are rounded, so that a method may differ from the budget
    by less than one step; `budget_of` counts the result.

    Args:
        fraction: The fraction of the demonstrations that is used.

    Raises:
        UsageError: A stage needs rollouts or demonstrations, and the budget has none.
    """
    sampling = [stage for stage in stages if stage.objective.uses_rollouts]
    learning = [stage for stage in stages if stage.learns_from_demonstrations]
    for needed, amount, what in (
        (sampling, budget.rollouts, "samples rollouts"),
        (learning, budget.demonstrations, "trains on demonstrations"),
    ):
        if needed and not amount and (sampling or not budget.rollouts):
            raise UsageError(
                f"method '{needed[0].method}' {what}, but the recipe's own method does not, so that the "
                "budget has none: choose the budget of another method with --method uniapl"
            )
    total = budget.demonstrations if sampling else budget.demonstrations + budget.rollouts
    share = Budget(
        rollouts=budget.rollouts // max(1, len(sampling)),
        demonstrations=max(1, round(fraction * total / max(1, len(learning)))),
    )
    return [_fit_stage(stage, share) for stage in stages]


def rollout_limit(config: Config) -> dict[str, Any]:
    """The key with which a stage that may replace rollouts samples no more of them than one that does not."""
    rollouts = _contents(config).rollouts
    if not config.rollout.max_resample_times or not rollouts:
        return {}
    return {"early_stopping": {"max_rollouts": min(rollouts, config.early_stopping.max_rollouts or rollouts)}}


def _fit_stage(config: Config, share: Budget) -> dict[str, Any]:
    completions = config.batching.prompts_per_step * config.rollout.num_generations
    if not config.objective.uses_rollouts:
        # About as many demonstrations per step as other methods have completions, if there are others.
        size = completions if share.rollouts else config.batching.demonstrations_per_step
        steps = max(1, round(share.demonstrations / size))
        per_step = max(1, round(share.demonstrations / steps))
        return {
            "max_steps": steps,
            "batching": {"demonstrations_per_step": per_step, "cold_start_steps": 0},
        }
    steps, cold = _steps(config, share.rollouts, completions)
    batching: dict[str, Any] = {"cold_start_steps": cold}
    demonstrations = share.demonstrations
    if cold and config.objective.mu_peak > 0:
        cold_per_step = _cold_demonstrations(config)
        later = config.objective.learns_from_demonstrations
        wanted = cold * cold_per_step + (steps - cold) * config.batching.demonstrations_per_step * later
        cold_per_step = max(1, round(cold_per_step * demonstrations / wanted))
        batching["cold_start_demonstrations_per_step"] = cold_per_step
        demonstrations -= cold * cold_per_step
    if config.objective.learns_from_demonstrations:
        batching["demonstrations_per_step"] = max(1, round(demonstrations / max(1, steps - cold)))
    return {"max_steps": steps, "batching": batching}


def _steps(config: Config, rollouts: int, completions: int) -> tuple[int, int]:
    """All steps, and those of the cold start, that sample this many rollouts."""
    cold = config.batching.cold_start_steps
    in_cold = config.batching.cold_start_prompts_per_step * config.rollout.num_generations
    if cold < 1:
        steps = max(1, round(rollouts / ((1 - cold) * completions + cold * in_cold)))
        return steps, round(cold * steps)
    rest = max(1, round((rollouts - cold * in_cold) / completions))
    return rest + int(cold), int(cold)


def _cold_demonstrations(config: Config) -> int:
    completions = config.batching.prompts_per_step * config.rollout.num_generations
    return config.batching.cold_start_demonstrations_per_step or completions

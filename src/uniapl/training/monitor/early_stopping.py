"""Rules that end a stage early, and the step with the best checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uniapl.config import EarlyStoppingConfig
from uniapl.tolerance import at_least, same


@dataclass(kw_only=True)
class Stopping:
    """State of a stage's early-stopping rules; checkpoints hold all of it."""

    best: float | None = None
    """The best value of the metric so far."""
    waited: int = 0
    """Values without improvement since then; steps without the metric do not count."""
    reason: str | None = None
    """Why the stage ended; None while it runs."""
    best_step: int | None = None
    """Step of the run with the best checkpoint; None without one."""
    best_value: float | None = None
    """The metric at `best_step`."""

    def update(
        self, rule: EarlyStoppingConfig, record: Mapping[str, Any], stage_tokens: int, stage_rollouts: int
    ) -> None:
        """Read a step's metrics and set `reason` if the stage ends with this step.

        Args:
            stage_tokens: Completion tokens that the stage has trained on.
            stage_rollouts: Rollouts that the stage has sampled.
        """
        value = _value(rule, record)
        if value is not None:
            sign = 1 if rule.greater_is_better else -1
            better = self.best is None or (sign * (value - self.best) > 0 and not same(value, self.best))
            self.best = value if better else self.best
            self.waited = 0 if better else self.waited + 1
            if rule.target is not None and at_least(sign * value, sign * rule.target):
                self.reason = f"target: {rule.metric} is {value:.4g}, the target {rule.target:g}"
            elif rule.patience is not None and self.waited >= rule.patience:
                unchanged = f"did not improve on {self.best:.4g}"
                self.reason = f"patience: {rule.metric} {unchanged} in the last {self.waited} evaluations"
        if self.reason is None and rule.max_tokens is not None and stage_tokens >= rule.max_tokens:
            self.reason = f"budget: trained on {stage_tokens:,} tokens, the limit is {rule.max_tokens:,}"
        if self.reason is None and rule.max_rollouts is not None and stage_rollouts >= rule.max_rollouts:
            self.reason = f"budget: sampled {stage_rollouts:,} rollouts, the limit is {rule.max_rollouts:,}"

    def update_best(self, rule: EarlyStoppingConfig, record: Mapping[str, Any]) -> None:
        """Let this step, whose checkpoint is saved, be the best one if its metric is better."""
        value, sign = _value(rule, record), 1 if rule.greater_is_better else -1
        if value is not None and (self.best_value is None or sign * (value - self.best_value) > 0):
            self.best_step, self.best_value = record["step"], value

    def restart(self, *, same_metric: bool) -> "Stopping":
        """The state under another rule, which keeps the best checkpoint of the same metric."""
        if same_metric:
            return Stopping(best_step=self.best_step, best_value=self.best_value)
        return Stopping()


def _value(rule: EarlyStoppingConfig, record: Mapping[str, Any]) -> float | None:
    value = record.get(rule.metric)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

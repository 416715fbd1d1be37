"""Rules that end a stage early: a target, no improvement (patience), or a token budget."""

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

    def update(self, rule: EarlyStoppingConfig, record: Mapping[str, Any], stage_tokens: int) -> None:
        """Read a step's metrics and set `reason` if the stage ends with this step.

        Args:
            stage_tokens: Completion tokens that the stage has trained on.
        """
        value = record.get(rule.metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            sign = 1 if rule.greater_is_better else -1
            better = self.best is None or (sign * (value - self.best) > 0 and not same(value, self.best))
            self.best = float(value) if better else self.best
            self.waited = 0 if better else self.waited + 1
            if rule.target is not None and at_least(sign * value, sign * rule.target):
                self.reason = f"target: {rule.metric} is {value:.4g}, the target {rule.target:g}"
            elif rule.patience is not None and self.waited >= rule.patience:
                unchanged = f"did not improve on {self.best:.4g}"
                self.reason = f"patience: {rule.metric} {unchanged} in the last {self.waited} evaluations"
        if self.reason is None and rule.max_tokens is not None and stage_tokens >= rule.max_tokens:
            self.reason = f"budget: trained on {stage_tokens:,} tokens, the limit is {rule.max_tokens:,}"

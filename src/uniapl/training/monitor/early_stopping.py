"""When a stage ends before its last step: the target is reached, nothing improves, the budget is spent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uniapl.config import EarlyStoppingConfig


@dataclass(kw_only=True)
class Stopping:
    """What the rules of a stage remember; all of it is in a checkpoint."""

    best: float | None = None
    """The best value of the watched metric so far."""
    waited: int = 0
    """Looks since then; a step without the metric is no look."""
    reason: str | None = None
    """Why the stage ended; None while it goes on."""

    def look(self, rule: EarlyStoppingConfig, record: Mapping[str, Any], stage_tokens: int) -> None:
        """Take in a step's metrics, and set `reason` if a rule says that it was the last one.

        Args:
            stage_tokens: Tokens of completions that the stage has learnt from.
        """
        value = record.get(rule.metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            sign = 1 if rule.greater_is_better else -1
            better = self.best is None or sign * (value - self.best) > 0
            self.best = float(value) if better else self.best
            self.waited = 0 if better else self.waited + 1
            if rule.target is not None and sign * (value - rule.target) >= 0:
                self.reason = f"target: {rule.metric} is {value:.4g}, the target {rule.target:g}"
            elif rule.patience is not None and self.waited >= rule.patience:
                best = f"no better than {self.best:.4g}"
                self.reason = f"patience: {rule.metric} was {best} in the last {self.waited} looks"
        if self.reason is None and rule.max_tokens is not None and stage_tokens >= rule.max_tokens:
            self.reason = f"budget: {stage_tokens:,} tokens were learnt from, of {rule.max_tokens:,}"

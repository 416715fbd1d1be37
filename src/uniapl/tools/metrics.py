"""Metrics of tool calls, the same in training and in evaluations."""

import functools
import operator
from collections.abc import Sequence

from uniapl.types import Rollout


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How often tools were called, and how often calls failed (TRL's names); nothing without tools.

    All are per completion, except the failures, which are per executed call.
    """
    uses = [rollout.tool_use for rollout in rollouts if rollout.messages]
    if not uses:
        return {}
    total = functools.reduce(operator.add, uses)
    return {
        "tools/call_frequency": total.calls / len(uses),
        "tools/failure_frequency": total.failed / total.calls if total.calls else 0.0,
        "tools/malformed": total.malformed / len(uses),
        "tools/unanswered": total.unanswered / len(uses),
    }

"""Rules that look at the last steps and warn, each with a remedy; they read metrics and change nothing."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]

SIGNIFICANT = 2.0
"""Standard errors by which the means of two windows must differ. Our choice: by chance alone one look in
thirty finds such a rise with the usual window, before the other conditions of a rule."""


def warnings(records: Records, *, window: int, bounds: tuple[float, float]) -> dict[str, str]:
    """What each rule that fires says, by its name.

    Args:
        records: Metrics of the run's steps, oldest first; the last `window` are compared with the `window`
            before, and none fires while there are fewer.
        bounds: Of a learned lambda.
    """
    if len(records) < 2 * window:
        return {}
    before, last = records[-2 * window : -window], records[-window:]
    found = {
        "divergence": _divergence(before, last),
        "multiplier_pinned": _multiplier_pinned(before, last, bounds[1]),
    }
    return {name: message for name, message in found.items() if message is not None}


def _divergence(before: Records, last: Records) -> str | None:
    """The policy wins ever more against the discriminator while what it is really for gets worse."""
    wins = _values(last, "discriminator/win_rate")
    rising = _moved(before, last, "discriminator/win_rate", up=True)
    if not rising or statistics.fmean(wins) <= 0.5:
        return None
    if _moved(before, last, "reward", up=False):
        what = "the reward falls"
    elif _moved(before, last, "sft/nll", up=True):
        what = "the demonstrations get less likely"
    else:
        return None
    return (
        f"the win rate rose to {statistics.fmean(wins):.2f} while {what}: the discriminator is being hacked. "
        "Lower objective.lambda_adv, or let the discriminator keep up (no freeze_step, more "
        "updates_per_step, a higher learning_rate); min_accuracy keeps lambda at 0 until it has"
    )


def _multiplier_pinned(before: Records, last: Records, highest: float) -> str | None:
    """lambda can grow no more, and the reward pays for it."""
    values = _values(last, "constraint/multiplier")
    if not values or min(values) < highest or not _moved(before, last, "reward", up=False):
        return None
    return (
        f"lambda_adv stays at its upper bound {highest:g} while the reward falls: the constraint cannot be "
        "held. Raise objective.max_expert_gap, give demonstrations more weight, or lower lambda_bounds"
    )


def _moved(before: Records, last: Records, key: str, *, up: bool) -> bool:
    """The mean moved in that direction by more than chance does."""
    old, new = _values(before, key), _values(last, key)
    if len(old) < 2 or len(new) < 2:
        return False
    rise = statistics.fmean(new) - statistics.fmean(old)
    error = math.sqrt(statistics.variance(old) / len(old) + statistics.variance(new) / len(new))
    return (rise if up else -rise) > SIGNIFICANT * error


def _values(records: Records, key: str) -> list[float]:
    values = [record.get(key) for record in records]
    return [value for value in values if value is not None and math.isfinite(value)]

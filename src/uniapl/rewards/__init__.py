"""Reward functions with TRL's signature, and the rules for their failures.

    def reward(prompts, completions, **columns) -> list[float | None]

A function returns one value per completion, in order. None means "does not apply". An exception, returned or
raised, means that the completion could not be scored. A function may be sync or async; all async functions
run in one event loop. Its parameters name what it receives: `prompts`, `completions`, `completion_ids`, TRL's
`trainer_state`, `log_extra` and `log_metric`, and columns of the data; or all of them as ``**kwargs``. A
completion is a string if the prompt is one, and a list with one assistant message if the prompt is a chat. A
function that can tell from the data which rows it can score has an attribute `check_rows(examples, **args)`
that returns a `RowCheck`; it is called once, before training, in the first of several processes. So is the
trial call of each function. Each process scores its own completions.

All failures follow one rule: the samples concerned have no reward, are left out of their group's mean and of
the loss, and are counted in ``rewards/<name>/error_rate`` or ``timeout_rate``. A failure never becomes a 0,
which would be a score.
"""

from uniapl.rewards import answers, builtin, code, formats, instructions, model
from uniapl.rewards.base import Rewarder, RewardFunction, RowCheck
from uniapl.rewards.finding import register
from uniapl.rewards.scoring import RewardOutcome, extra_columns

REGISTERED = (answers, builtin, code, formats, instructions, model)
"""Modules that register their functions when they are imported."""

__all__ = ["RewardFunction", "RewardOutcome", "Rewarder", "RowCheck", "extra_columns", "register"]

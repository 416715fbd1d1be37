"""Scoring answers: reward functions with TRL's signature, and the rules for what they do wrong.

    def reward(prompts, completions, **columns) -> list[float | None]

One value per completion, in order; None says "does not apply", an exception, returned or raised, that an
answer could not be scored. A function may be sync or async. It is called with those of `prompts`,
`completions`, `completion_ids` and the data's columns that its parameters name (with all of them if it takes
``**kwargs``). A completion is a string where the prompt is one, and a list with one assistant message where
the prompt is a chat. A function that can tell from the data which rows it can score has an attribute
`check_rows(examples, **args)` that returns a `RowCheck`; it is asked once, before training.

What can go wrong, and the one rule for all of it (docs/architecture.md has the table): the samples concerned
have NO reward, they are left out of their group's mean and of the loss, and the failure is counted in
``rewards/<name>/error_rate`` or ``timeout_rate``. It is never turned into a 0, which would be a judgement.
"""

from uniapl.rewards import builtin as _builtin  # these register the functions that come with the package
from uniapl.rewards import code as _code
from uniapl.rewards import instructions as _instructions
from uniapl.rewards import model as _model
from uniapl.rewards.base import Rewarder, RewardFunction, RewardOutcome, RowCheck
from uniapl.rewards.finding import register

__all__ = ["RewardFunction", "RewardOutcome", "Rewarder", "RowCheck", "register"]
del _builtin, _code, _instructions, _model

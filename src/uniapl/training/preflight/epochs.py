"""The number of steps of a stage that is given in epochs."""

import math
from dataclasses import replace
from fractions import Fraction

from uniapl.config.resolve import Resolved, with_notes
from uniapl.data.rows import Dataset
from uniapl.rewards import Rewarder
from uniapl.training.inputs import stream_examples


def with_max_steps(stage: Resolved, dataset: Dataset, rewarder: Rewarder) -> Resolved:
    """The stage with the `max_steps` that `num_train_epochs` asks for; the stage itself without that key.

    An epoch is one pass over the usable rows of the prompt stream, or of the demonstration stream if the
    method samples no rollouts. The last step may begin another pass. Steps of a cold start without prompts
    are added.
    """
    config = stage.config
    if config.num_train_epochs is None:
        return stage
    prompts, demonstrations = stream_examples(config, dataset, rewarder)
    if config.objective.uses_rollouts:
        rows, per_step = len(prompts), config.batching.prompts_per_step
    else:
        rows, per_step = len(demonstrations), config.batching.demonstrations_per_step
    # In floating point, 0.1 epochs of 30 rows are more than 3 rows.
    # At least 1 also without rows, which `check_stage` refuses.
    steps = max(1, math.ceil(Fraction(repr(config.num_train_epochs)) * rows / per_step))
    cold = config.batching.cold_start_steps
    if cold and config.objective.uses_rollouts and not config.batching.cold_start_prompts_per_step:
        steps = math.ceil(steps / (1 - Fraction(repr(cold)))) if cold < 1 else steps + int(cold)
    return with_notes(
        replace(
            stage,
            config=config.model_copy(update={"max_steps": steps}),
            sources=stage.sources | {"max_steps": "num_train_epochs"},
        )
    )

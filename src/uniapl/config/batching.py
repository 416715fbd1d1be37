"""The section `batching`: contents of a step, and its split into micro-batches."""

from typing import Literal

from pydantic import Field, field_validator

from uniapl.config.section import Section


class BatchingConfig(Section):
    """Contents of one step, and its split into micro-batches, which does not change the loss."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts for which each step samples rollouts."""
    prompt_selection: Literal["uniform", "informative"] = "uniform"
    """uniform draws every prompt once per epoch. informative keeps the pass rate of each prompt
    (objective.pass_threshold) and skips a prompt with the probability that all of its next rollouts pass; the
    demonstrations of sampled prompts that have never passed are the first in their step."""
    demonstrations_per_step: int = Field(default=8, ge=1)
    """Demonstrations in each step."""
    cold_start_steps: float = Field(default=0, ge=0)
    """Steps at the start of a stage with the two following numbers in place of the two above; a value below 1
    is the fraction of the stage's steps, 0 has no cold start."""
    cold_start_prompts_per_step: int = Field(default=0, ge=0)
    """Prompts of each cold-start step; 0 samples nothing."""
    cold_start_demonstrations_per_step: int | None = Field(default=None, ge=1)
    """Demonstrations of each cold-start step; null takes as many as a step with rollouts has completions."""
    per_device_train_batch_size: int | None = Field(default=None, ge=1)
    """Maximum number of rows of a micro-batch; null limits only its tokens."""
    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Maximum number of tokens of a micro-batch, which has at least one row. A shared prompt counts once, and
    padding counts if rows are not packed."""
    packing: bool = True
    """Pack rows without padding and with each prompt once, if the model's attention supports it; false pads
    rows, which is the reference."""

    @field_validator("cold_start_steps")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("must be a whole number, or a fraction below 1")
        return value

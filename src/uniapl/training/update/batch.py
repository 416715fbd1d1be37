"""The batch of one step: demonstrations and rollouts together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from uniapl.data.batching import Row, chosen_rows, completion_counts, component_counts
from uniapl.training.update.credit import Credit
from uniapl.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class MixedBatch:
    """The rows of one step, from all processes, and this process's micro-batches of them."""

    rows: Sequence[Row]
    micro_batches: Sequence[MicroBatch]
    """At least one. With DDP on several processes the last one is empty; with FSDP2 empty ones make the count
    equal on all processes."""
    weights: dict[str, float]
    """One weight per component: "sft", "rl", "adv", "kl", "teacher", "pref", and "entropy" (minus its
    coefficient)."""
    credits: Sequence[Credit] = ()
    """One per group of rollouts."""
    lambda_adv: float = 0.0
    """The adversary's weight, as a loss term or inside the rewards' advantages."""

    @cached_property
    def counts(self) -> dict[str, int]:
        """Tokens per component, over all processes."""
        return component_counts(self.rows)

    @cached_property
    def completions(self) -> dict[str, int]:
        """Completions per component, over all processes."""
        return completion_counts(self.rows)

    @property
    def rollout_tokens(self) -> int:
        """Tokens of all rollouts, also of those that are left out of the loss."""
        return sum(row.num_written for row in self.rows if row.sampling_logprobs is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens over all processes, with the prompt of every row (TRL's `num_tokens`)."""
        return sum(row.length for row in (*self.rows, *chosen_rows(self.rows)))

    @property
    def completion_tokens(self) -> int:
        """Completion tokens, over all processes."""
        return sum(row.num_written for row in (*self.rows, *chosen_rows(self.rows)))

    @property
    def pair_tokens(self) -> int:
        """Completion tokens that only the preference pairs have: those of chosen and rejected completions
        without the rollouts."""
        rejected = [row for row in self.rows if row.components == {"pref"}]
        return sum(row.num_written for row in (*rejected, *chosen_rows(self.rows)))

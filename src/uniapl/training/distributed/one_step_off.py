"""One step off: the next step's rollouts are sampled while this step trains.

They come from the weights before this step's update, and are learnt from after it. They keep the
log-probabilities that they had then, and the importance weights correct for the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.utils import gather_object

from uniapl.training.distributed.rank_zero_sampler import Key, RankZeroSampler
from uniapl.types import Rollout, TokenIds


@dataclass(kw_only=True)
class Ahead:
    """A sampler whose rollouts may have been begun a step ago; all processes call it together."""

    sampler: RankZeroSampler
    landed: dict[Key, tuple[Rollout, ...]] = field(default_factory=dict)
    """Rollouts that wait for their step, of all processes."""

    def check(self) -> None:
        """See :class:`RankZeroSampler`."""
        self.sampler.check()

    def sample(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> list[tuple[Rollout, ...]]:
        """This process's rollouts: those that were begun for these prompts and seeds, or else new ones."""
        self.land()
        found = [self.landed.get(key, ()) for key in zip(prompts, seeds, strict=True)]
        self.landed = {}
        # Not so after a resume with another recipe, or when vLLM was lost on the way.
        if all(gather_object([all(len(group) == num_generations for group in found)])):
            return found
        return self.sampler.sample(
            prompts, seeds=seeds, num_generations=num_generations, policy_version=policy_version
        )

    def begin(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> None:
        """Send the weights and go on; what comes is for the :meth:`sample` of the same prompts and seeds."""
        self.sampler.begin(
            prompts, seeds=seeds, num_generations=num_generations, policy_version=policy_version
        )

    def land(self) -> None:
        """Wait for what was begun."""
        self.landed |= self.sampler.land()

    def state(self) -> list[dict[str, Any]]:
        """What has landed, as JSON values."""
        return [
            {"prompt_ids": prompt, "seed": seed, "rollouts": [asdict(rollout) for rollout in group]}
            | self._settings
            for (prompt, seed), group in self.landed.items()
        ]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of :meth:`state`; rollouts of another recipe are left out."""
        self.landed = {
            (tuple(kept["prompt_ids"]), kept["seed"]): tuple(
                Rollout(
                    completion_ids=tuple(rollout["completion_ids"]),
                    sampling_logprobs=tuple(rollout["sampling_logprobs"]),
                    finish_reason=rollout["finish_reason"],
                    policy_version=rollout["policy_version"],
                )
                for rollout in kept["rollouts"]
            )
            for kept in state
            if {name: kept[name] for name in self._settings} == self._settings
        }

    @property
    def _settings(self) -> dict[str, float]:
        """On which answers depend beside prompt, seed and weights."""
        sampler = self.sampler.sampler
        return {
            "temperature": sampler.temperature,
            "max_completion_length": sampler.max_completion_length,
        }

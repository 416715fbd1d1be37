"""A sampler whose rollouts call tools."""

from dataclasses import dataclass

from uniapl.rollout import Sampler, SampleRequest
from uniapl.tools.trajectories import Toolbox, sample_trajectories
from uniapl.types import Rollout


@dataclass(frozen=True, kw_only=True)
class ToolSampler:
    """Samples turns with another sampler and calls tools between them."""

    sampler: Sampler
    toolbox: Toolbox
    max_completion_length: int
    """Tokens of all turns and results together."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt, in the order of the prompts."""
        return sample_trajectories(
            self.sampler, request, self.toolbox, max_completion_length=self.max_completion_length
        )

    def check(self) -> None:
        """See :class:`Sampler`."""
        self.sampler.check()

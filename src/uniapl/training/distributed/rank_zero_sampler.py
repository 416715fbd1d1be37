"""One process speaks to the engine for all: weights are sent once, and all hear of a failure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from uniapl.errors import UniAPLError
from uniapl.rollout.vllm import VLLMSampler
from uniapl.types import Rollout, TokenIds

Result = TypeVar("Result")
Key = tuple[TokenIds, int]
"""A prompt and its seed: within a run there are no two such, whatever the number of processes."""


@dataclass(kw_only=True)
class RankZeroSampler:
    """A sampler that all processes call together, each for its own prompts."""

    sampler: VLLMSampler
    accelerator: Accelerator
    begun: list[Key] | None = None
    """What is sampled in the background, of all processes; None: nothing."""
    _land: Callable[[], list[tuple[Rollout, ...]] | None] | None = None
    """In the first process: waits for it."""

    def check(self) -> None:
        """See :class:`VLLMSampler`."""
        self._in_first_process(self.sampler.check)

    def sample(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> list[tuple[Rollout, ...]]:
        """This process's rollouts. See :class:`Sampler`."""
        shares = self._shares(prompts, seeds)
        keys = [key for share in shares for key in share]
        everywhere = self._in_first_process(
            lambda: self.sampler.sample(
                [prompt for prompt, _ in keys],
                seeds=[seed for _, seed in keys],
                num_generations=num_generations,
                policy_version=policy_version,
            )
        )
        before = sum(len(share) for share in shares[: self.accelerator.process_index])
        return everywhere[before : before + len(prompts)]

    def begin(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> None:
        """As :meth:`sample`, in the background: :meth:`land` has the rollouts."""
        keys = [key for share in self._shares(prompts, seeds) for key in share]

        def begin() -> None:
            self._land = self.sampler.begin(
                [prompt for prompt, _ in keys],
                seeds=[seed for _, seed in keys],
                num_generations=num_generations,
                policy_version=policy_version,
            )

        self._in_first_process(begin)
        self.begun = keys

    def land(self) -> dict[Key, tuple[Rollout, ...]]:
        """Wait for what was begun: all processes' rollouts; nothing if nothing was, or vLLM was lost."""
        if self.begun is None:
            return {}
        keys, self.begun = self.begun, None
        groups = self._in_first_process(lambda: self._land() if self._land else None)
        return dict(zip(keys, groups, strict=True)) if groups is not None else {}

    def _shares(self, prompts: Sequence[TokenIds], seeds: Sequence[int]) -> list[list[Key]]:
        """Of each process."""
        return gather_object([list(zip(prompts, seeds, strict=True))])

    def _in_first_process(self, work: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [work()]
            except UniAPLError as error:
                outcome = [error]
        (result,) = broadcast_object_list(outcome)
        if isinstance(result, UniAPLError):
            raise result
        return result

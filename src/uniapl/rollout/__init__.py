"""Sampling: the request, the protocol of samplers, and their implementations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from uniapl.rollout.caches import RowCaches
from uniapl.types import Rollout, TokenIds

Methods = Mapping[str, Callable[..., Any]]
"""The tools by name that only one rollout calls: the methods of its environment."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The prompts of one call of a sampler.

    Example:
        SampleRequest(prompts=[(5, 9), (7,)], seeds=[11, 12], num_generations=4, policy_version=3)
        asks for four rollouts of each of two prompts.
    """

    prompts: Sequence[TokenIds]
    """Token ids of each prompt."""
    seeds: Sequence[int]
    """One seed per prompt, for all of its rollouts."""
    num_generations: int
    """Rollouts per prompt."""
    max_completion_length: int | None = None
    """Tokens of each completion; None is the sampler's own limit."""
    caches: RowCaches | None = None
    """Has caches of rows that go on in this call, and is given those of its rollouts, which may go on in
    the next call; None if none does. vLLM has caches of its own."""
    completion_lengths: Sequence[int] | None = None
    """Tokens of each prompt's completion, at most `max_completion_length`, for engines that refuse a request
    beyond the model's context; None is the same limit for all."""
    policy_version: int = 0
    """The training step whose weights sample; it is recorded in every rollout."""
    begin: Callable[[], Sequence[Sequence[Methods]]] | None = None
    """Makes the environments of all rollouts, and returns the methods of each rollout of each prompt; None
    without environments. A sampler calls it when it samples the rollouts from the beginning, also again."""


@runtime_checkable
class Sampler(Protocol):
    """Samples completions: token ids in, token ids out.

    The rollouts of a prompt depend only on its ids, its seed and the policy, never on the other prompts.
    """

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt, in the order of the prompts."""
        ...

    def check(self) -> None:
        """Sample once, to report errors before training starts.

        Raises:
            UsageError: The model or this environment does not support the sampler.
        """
        ...


SampledTokens = tuple[list[int], list[float]]
"""The token ids of a completion and their log-probabilities."""

"""Sampling answers: the protocol, and the samplers that fulfil it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from uniapl.types import Rollout, TokenIds


@runtime_checkable
class Sampler(Protocol):
    """Whatever can sample G answers to each prompt.

    Tokens in, tokens out: what comes back as ids is what is trained on. The rollouts of a prompt depend on
    its ids, its seed and the policy alone, never on the prompts beside it.
    """

    def sample(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> list[tuple[Rollout, ...]]:
        """`num_generations` rollouts for each prompt, in the prompts' order."""
        ...

    def check(self) -> None:
        """Try it before training.

        Raises:
            UsageError: It cannot sample from this model, or not here.
        """
        ...

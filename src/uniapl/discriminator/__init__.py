"""Telling the expert's answers from the policy's: the protocol, and the discriminators that fulfil it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from uniapl.types import Example, RolloutGroup, TokenIds


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer that is given a logit, with its prompt and the expert's answer to that prompt."""

    example: Example
    completion_ids: TokenIds
    text: str


@runtime_checkable
class Discriminator(Protocol):
    """Gives a logit to an answer: higher = more like the expert's.

    A candidate's logit depends on that candidate alone, never on the ones scored beside it.
    """

    needs_reference: ClassVar[bool]
    """It can only score where the prompt has a demonstration."""

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The logit of each candidate, in their order.

        Raises:
            UniAPLError: Some could not be scored; never a number that is not theirs.
        """
        ...


def candidates_of(group: RolloutGroup) -> tuple[list[Candidate], Candidate | None]:
    """The rollouts of a group, and the demonstration, if there is one."""
    example = group.example
    rollouts = [
        Candidate(example=example, completion_ids=rollout.completion_ids, text=text)
        for rollout, text in zip(group.rollouts, group.texts, strict=True)
    ]
    if example.demonstration is None or example.demonstration_ids is None:
        return rollouts, None
    expert = Candidate(example=example, completion_ids=example.demonstration_ids, text=example.demonstration)
    return rollouts, expert

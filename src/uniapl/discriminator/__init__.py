"""Telling the expert's answers from the policy's: the protocol, and the discriminators that fulfil it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from uniapl.types import Example, RolloutGroup, TokenIds


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer that is given a logit, with its prompt and the expert's answer to that prompt."""

    example: Example
    completion_ids: TokenIds
    text: str
    reference: str | None
    """The demonstration of its prompt, decoded as rollouts are; None where there is none."""


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


def candidates_of(
    group: RolloutGroup, decode: Callable[[TokenIds], str]
) -> tuple[list[Candidate], Candidate | None]:
    """The rollouts of a group, and the demonstration, if there is one.

    Args:
        decode: Makes text of the demonstration's ids as it was made of the rollouts'. The data's own text
            lacks what a chat template writes around it: whoever reads text could tell the two apart by that.
    """
    ids = group.example.demonstration_ids
    reference = decode(ids) if ids is not None else None
    rollouts = [
        Candidate(
            example=group.example, completion_ids=rollout.completion_ids, text=text, reference=reference
        )
        for rollout, text in zip(group.rollouts, group.texts, strict=True)
    ]
    if ids is None or reference is None:
        return rollouts, None
    return rollouts, Candidate(example=group.example, completion_ids=ids, text=reference, reference=reference)

"""Discriminators distinguish the expert's completions from the policy's: the protocol and implementations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from uniapl.data.batching import batch_sequences
from uniapl.types import Example, Given, RolloutGroup, TokenIds
from uniapl.untyped import items_of


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A completion to score, with its prompt and the demonstration of that prompt."""

    example: Example
    completion_ids: TokenIds
    given: Given = ()
    text: str
    reference: str | None
    """The decoded demonstration; None if the prompt has none."""


@runtime_checkable
class Discriminator(Protocol):
    """Scores completions with a logit: higher = more like the expert's.

    The logit of a candidate does not depend on the other candidates.
    """

    needs_reference: ClassVar[bool]
    """Only candidates whose prompt has a demonstration can be scored."""

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the logit of each candidate, in their order.

        Raises:
            UniAPLError: At least one candidate could not be scored.
        """
        ...


def candidates_of(
    group: RolloutGroup, decode: Callable[[TokenIds], str]
) -> tuple[list[Candidate], Candidate | None]:
    """Return the rollouts of a group, and the demonstration if there is one, as candidates.

    Args:
        group: In the uniform form (`discriminator.ending.UniformEnding`).
        decode: Decodes the demonstration's ids as the rollouts were decoded. The text in the data lacks what
            the chat template adds, by which a discriminator that reads text could recognise it.
    """
    example, ids = group.example, group.example.demonstration_ids
    reference = decode(ids) if ids is not None else None
    rollouts = [
        Candidate(
            example=example,
            completion_ids=rollout.completion_ids,
            given=rollout.given,
            text=text,
            reference=reference,
        )
        for rollout, text in zip(group.rollouts, group.texts, strict=True)
    ]
    if ids is None or reference is None:
        return rollouts, None
    return rollouts, Candidate(
        example=example,
        completion_ids=ids,
        given=example.demonstration_given,
        text=reference,
        reference=reference,
    )


def batched_logits(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    compute: Callable[[list[int]], Tensor],
    *,
    max_tokens: int,
    packed: bool,
) -> list[float]:
    """Compute logits batch by batch and return them in the order of the sequences.

    Args:
        sequences: (prompt ids, completion ids).
        compute: Returns the logits [n] of the sequences with these indices.
        max_tokens: Tokens per batch, counting a prompt once if packed and with padding otherwise; a batch
            has at least one sequence.
    """
    batches = batch_sequences(sequences, max_tokens=max_tokens, packed=packed)
    logits = [0.0] * len(sequences)
    for indices in batches:
        for index, logit in zip(indices, items_of(compute(indices)), strict=True):
            logits[index] = logit
    return logits

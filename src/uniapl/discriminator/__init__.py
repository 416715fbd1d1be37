"""Telling the expert's answers from the policy's: the protocol, and the discriminators that fulfil it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from uniapl.types import TokenIds


@runtime_checkable
class Discriminator(Protocol):
    """Gives a logit to an answer: higher = more like the expert's.

    A sequence's logit depends on that sequence alone, never on the ones scored beside it.
    """

    def score(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        """The logit of each (prompt ids, completion ids)."""
        ...

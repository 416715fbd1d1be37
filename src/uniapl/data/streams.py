"""The two streams of a run: prompts for rollouts, and demonstrations."""

import itertools
from collections.abc import Callable, Sequence

import torch

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.types import Example, derive_seed
from uniapl.untyped import items_of


class Stream:
    """An endless seeded shuffle of examples. A checkpoint saves only its position.

    Epoch e is a permutation that depends only on (seed, name, e).
    """

    def __init__(self, examples: Sequence[Example], *, seed: int, name: str, position: int = 0) -> None:
        self._examples, self._seed, self._name = examples, seed, name
        self._order: tuple[int, list[int]] = (-1, [])
        self.position = position
        self.probability: Callable[[Example], float] | None = None
        """The probability, above 0, with which an example is drawn at its turn; otherwise it is skipped. The
        draw depends only on (seed, name, position). None draws every example."""

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, as a fraction; skipped examples count."""
        return self.position / max(1, len(self._examples))

    def take(self, count: int) -> list[Example]:
        """The next `count` examples, across epochs."""
        positions = self._next(count)
        if positions:
            self.position = positions[-1] + 1
        return [self._example_at(position) for position in positions]

    def peek(self, count: int) -> list[Example]:
        """The next `count` examples, without a change of position."""
        return [self._example_at(position) for position in self._next(count)]

    def _next(self, count: int) -> list[int]:
        """Positions of the next `count` examples that are drawn."""
        turns = itertools.count(self.position) if self._examples else ()
        return [*itertools.islice(filter(self._is_drawn, turns), count)]

    def _is_drawn(self, position: int) -> bool:
        if self.probability is None:
            return True
        drawn = derive_seed(self._seed, self._name, "turn", position)
        return drawn < self.probability(self._example_at(position)) * 2**63

    def _example_at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, self._name, epoch))
            self._order = (epoch, items_of(torch.randperm(len(self._examples), generator=generator)))
        return self._examples[self._order[1][offset]]


def split_streams(
    dataset: Dataset,
    *,
    can_be_rewarded: Callable[[Example], bool],
    compares: bool,
    uses_teacher: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Examples to sample rollouts for, and examples with demonstrations; an example may be in both.

    Rollouts are sampled if a reward function applies, if there is a teacher, or if a discriminator or
    preference pairs (`compares`) compare them with a demonstration.
    """
    demonstrations = [e for e in dataset.examples if e.demonstrated_turns]
    prompts = [
        e
        for e in dataset.examples
        if uses_teacher or can_be_rewarded(e) or (compares and e.demonstration_ids is not None)
    ]
    return prompts, demonstrations


def is_held_out(example: Example, config: Config) -> bool:
    """Whether the discriminator is never trained on this prompt, drawn by the prompt's token ids.

    The draw does not depend on the run's seed: a resumed run with another seed would train on these prompts.
    """
    drawn = derive_seed(0, "held out", *example.prompt_ids)
    return drawn < config.discriminator.held_out_fraction * 2**63

"""The two streams that a run draws from: prompts to sample for, and demonstrations."""

from collections.abc import Callable, Sequence

import torch

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.types import Example, derive_seed


class Stream:
    """An endless, seeded shuffle of some examples, with a position that a checkpoint can hold.

    Epoch e is a permutation drawn from (seed, name, e) alone, so a position is all there is to save.
    """

    def __init__(self, examples: Sequence[Example], *, seed: int, name: str, position: int = 0) -> None:
        self._examples, self._seed, self._name = examples, seed, name
        self._order: tuple[int, list[int]] = (-1, [])
        self.position = position

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far."""
        return self.position / max(1, len(self._examples))

    def take(self, count: int) -> list[Example]:
        """The next `count` examples; an epoch may end in the middle."""
        taken = self.peek(count)
        self.position += len(taken)
        return taken

    def peek(self, count: int) -> list[Example]:
        """What :meth:`take` would return; the position stays."""
        return [self._at(self.position + offset) for offset in range(count)] if self._examples else []

    def _at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, self._name, epoch))
            self._order = (epoch, torch.randperm(len(self._examples), generator=generator).tolist())
        return self._examples[self._order[1][offset]]


def split_streams(
    dataset: Dataset,
    *,
    can_be_rewarded: Callable[[Example], bool],
    uses_adversary: bool,
) -> tuple[list[Example], list[Example]]:
    """(examples to sample answers for, examples to learn demonstrations from): a row may be in both.

    A row is worth sampling when some reward function applies to it, or when an adversary can compare its
    answers with its demonstration.
    """
    demonstrations = [e for e in dataset.examples if e.demonstration_ids is not None]
    prompts = [
        e
        for e in dataset.examples
        if can_be_rewarded(e) or (uses_adversary and e.demonstration_ids is not None)
    ]
    return prompts, demonstrations


def is_held_out(example: Example, config: Config) -> bool:
    """Whether the discriminator never learns from this prompt: drawn by its ids, alike for its copies."""
    drawn = derive_seed(config.seed, "held out", *example.prompt_ids)
    return drawn < config.discriminator.held_out_fraction * 2**63

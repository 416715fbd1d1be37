"""The two streams of a run: prompts for rollouts, and demonstrations."""

from collections.abc import Callable, Sequence

import torch

from uniapl.config import Config
from uniapl.data.rows import Dataset
from uniapl.types import Example, derive_seed


class Stream:
    """An endless seeded shuffle of examples. A checkpoint saves only its position.

    Epoch e is a permutation that depends only on (seed, name, e).
    """

    def __init__(self, examples: Sequence[Example], *, seed: int, name: str, position: int = 0) -> None:
        self._examples, self._seed, self._name = examples, seed, name
        self._order: tuple[int, list[int]] = (-1, [])
        self.position = position

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far, as a fraction."""
        return self.position / max(1, len(self._examples))

    def take(self, count: int) -> list[Example]:
        """The next `count` examples, across epochs."""
        taken = self.peek(count)
        self.position += len(taken)
        return taken

    def peek(self, count: int) -> list[Example]:
        """The next `count` examples, without a change of position."""
        return [self._example_at(self.position + offset) for offset in range(count)] if self._examples else []

    def _example_at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, self._name, epoch))
            self._order = (epoch, torch.randperm(len(self._examples), generator=generator).tolist())
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

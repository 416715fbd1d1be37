"""Demonstrations that a discriminator is trained on, after their own prompts and after those of others."""

import random
from collections.abc import Sequence

from uniapl.types import Example, TokenIds, Tokens, derive_seed

CANDIDATES = 12
"""Demonstrations that are tried for each prompt, or 4 for each one that is wanted if these are more."""


class Demonstrations:
    """Demonstrations and the prompts that they belong to."""

    def __init__(
        self, examples: Sequence[Example] = (), *, seed: int = 0, context_length: int | None = None
    ) -> None:
        """Keep the examples that have a demonstration.

        Args:
            seed: Seed of all draws.
            context_length: Maximum tokens of a prompt and the demonstration of another; None has no limit.
        """
        self.examples = [example for example in examples if example.demonstration_ids is not None]
        self._seed, self._context_length = seed, context_length
        self._own: dict[TokenIds, set[TokenIds | None]] = {}
        for example in self.examples:
            self._own.setdefault(example.prompt_ids, set()).add(example.demonstration_ids)

    def draw(self, count: int, *names: str | int) -> list[Example]:
        """Up to `count` different examples in random order; `names` select the random numbers."""
        rng = random.Random(derive_seed(self._seed, *names))
        return rng.sample(self.examples, min(len(self.examples), count))

    def mismatched(self, example: Example, count: int, *names: int) -> list[Tokens]:
        """This prompt with up to `count` different demonstrations of others, none of which belongs to it too.

        Args:
            names: Select the random numbers, in addition to the example's row.
        """
        own = {example.demonstration_ids, *self._own.get(example.prompt_ids, ())}
        found: list[Tokens] = []
        for other in self.draw(count and max(CANDIDATES, 4 * count), "mismatched", example.row, *names):
            shown = other.demonstration_tokens
            assert shown is not None
            ids = shown.completion
            too_long = (
                self._context_length is not None and len(example.prompt_ids) + len(ids) > self._context_length
            )
            if other.prompt_ids != example.prompt_ids and ids not in own and not too_long:
                own.add(ids)
                found.append(shown._replace(prompt=example.prompt_ids))
        return found[:count]

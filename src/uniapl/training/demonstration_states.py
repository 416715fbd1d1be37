"""Reference states of demonstrations, next to their own prompt and next to other prompts, computed once."""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uniapl.models.token_states import TokenStates
from uniapl.types import Example, TokenIds, derive_seed

MISMATCHES = 3
"""Demonstrations of other prompts per prompt. Our choice."""
CACHE_BYTES = 2**31
"""Size of the cache, beyond which the states that were used least recently are dropped. Our choice."""


@dataclass(frozen=True, kw_only=True)
class ExampleStates:
    """The states of an example's completions."""

    demonstration: TokenStates
    mismatched: tuple[TokenStates, ...]
    """Demonstrations of other prompts, after this prompt."""
    rejected: TokenStates | None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        parts = [self.demonstration, *self.mismatched, *([self.rejected] if self.rejected else [])]
        return sum(part.states.nbytes + part.logprobs.nbytes for part in parts)


class DemonstrationStates:
    """Reads an example's completions when they are first needed.

    The completions of one example are read in one pass without others, so that the values do not depend on
    what was read before: a resumed run computes the same numbers.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        held_out: Callable[[Example], bool],
        read: Callable[[Sequence[tuple[TokenIds, TokenIds]]], list[TokenStates]],
        seed: int,
    ) -> None:
        """Split the examples, all of which have a demonstration.

        Args:
            held_out: Whether an example is reserved to measure what the discriminator knows.
            read: Reads the text of (prompt, completion) pairs: :meth:`TokenReader.read` without end tokens.
            seed: Seed of the draw of mismatched demonstrations.
        """
        self.train = [example for example in examples if not held_out(example)]
        self.held_out = [example for example in examples if held_out(example)]
        self._held_out, self._read, self._seed = held_out, read, seed
        self._cache: OrderedDict[int, ExampleStates] = OrderedDict()
        self._bytes = 0

    def of(self, example: Example) -> ExampleStates:
        """The states of an example."""
        if example.row in self._cache:
            self._cache.move_to_end(example.row)
            return self._cache[example.row]
        assert example.demonstration_ids is not None
        completions = [example.demonstration_ids, *self._mismatched(example)]
        if example.rejected_ids is not None:
            completions.append(example.rejected_ids)
        states = self._read([(example.prompt_ids, completion) for completion in completions])
        rejected = states.pop() if example.rejected_ids is not None else None
        found = ExampleStates(demonstration=states[0], mismatched=tuple(states[1:]), rejected=rejected)
        self._cache[example.row] = found
        self._bytes += found.num_bytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].num_bytes
        return found

    def _mismatched(self, example: Example) -> list[TokenIds]:
        """Demonstrations of other prompts; those of held-out examples never reach the training."""
        others = self.held_out if self._held_out(example) and len(self.held_out) > 1 else self.train
        rng = random.Random(derive_seed(self._seed, "mismatched", example.row))
        found: list[TokenIds] = []
        for other in rng.sample(others, min(len(others), 4 * MISMATCHES)):
            ids = other.demonstration_ids
            if other.prompt_ids != example.prompt_ids and ids not in (example.demonstration_ids, *found):
                assert ids is not None
                found.append(ids)
        return found[:MISMATCHES]

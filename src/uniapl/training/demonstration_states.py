"""Reference states of demonstrations, next to their own prompt and next to other prompts, computed once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uniapl.discriminator.demonstrations import Demonstrations
from uniapl.models.token_states import TokenStates
from uniapl.types import Example, Tokens

MOST_MEASURED = 64
"""Examples on which the head is measured in each step. Our choice."""
MEASURED_MISMATCHES = 3
"""Mismatched demonstrations of each of them, independent of the number that is trained on. Our choice."""
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
        read: Callable[[Sequence[Tokens]], list[TokenStates]],
        seed: int,
        num_mismatched: int,
        context_length: int | None = None,
    ) -> None:
        """Split the examples, all of which have a demonstration.

        Args:
            held_out: Whether an example is reserved to measure what the discriminator knows.
            read: Reads the text of prompts with completions: :meth:`TokenReader.read` without end tokens.
            seed: Seed of the draw of mismatched demonstrations.
            num_mismatched: Mismatched demonstrations of an example that are trained on.
            context_length: Maximum tokens of a prompt and a completion; None has no limit.
        """
        limits = {"seed": seed, "context_length": context_length}
        train = Demonstrations([example for example in examples if not held_out(example)], **limits)
        other = Demonstrations([example for example in examples if held_out(example)], **limits)
        self.train, self.held_out = train.examples, other.examples
        self.measured = (self.held_out or self.train)[:MOST_MEASURED]
        self._measured_rows = {example.row for example in self.measured}
        # Demonstrations of held-out examples never reach the training.
        self._sources = {False: train, True: other if len(self.held_out) > 1 else train}
        self._num_mismatched = num_mismatched
        self._held_out, self._read = held_out, read
        self._cache: OrderedDict[int, ExampleStates] = OrderedDict()
        self._bytes = 0

    def of(self, example: Example) -> ExampleStates:
        """The states of an example."""
        if example.row in self._cache:
            self._cache.move_to_end(example.row)
            return self._cache[example.row]
        own = example.demonstration_tokens
        assert own is not None
        sequences = [own, *self._mismatched(example)]
        if example.rejected_ids is not None:
            sequences.append(Tokens(own.prompt, example.rejected_ids))
        states = self._read(sequences)
        rejected = states.pop() if example.rejected_ids is not None else None
        found = ExampleStates(demonstration=states[0], mismatched=tuple(states[1:]), rejected=rejected)
        self._cache[example.row] = found
        self._bytes += found.num_bytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].num_bytes
        return found

    def _mismatched(self, example: Example) -> list[Tokens]:
        held_out = self._held_out(example)
        measured = MEASURED_MISMATCHES if example.row in self._measured_rows else 0
        trained = 0 if held_out else self._num_mismatched
        return self._sources[held_out].mismatched(example, max(measured, trained))

"""The form in which every discriminator reads completions: their text, and one end token for all."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from uniapl.data.tokenization import encode_continuation, text_length
from uniapl.types import Example, Given, RolloutGroup, TokenIds
from uniapl.untyped import decode


@dataclass(frozen=True, kw_only=True)
class UniformEnding:
    """Makes completions with the same text equal, so that only the text can distinguish expert and policy.

    How a completion was closed (by one of several end tokens, a stop string or the length limit) and how its
    text was split into tokens would reveal who wrote it. A truncated completion is read as if it ended there.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Collection[int]
    end_id: int
    """The token that closes every completion."""
    stop_strings: Sequence[str] = ()
    context_length: int | None = None
    """Maximum tokens of prompt and completion: a truncated completion may leave no room for its end token."""

    @staticmethod
    def of(
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        context_length: int | None,
    ) -> "UniformEnding":
        """The ending that most demonstrations have already."""
        ends = Counter(e.demonstration_ids[-1] for e in examples if e.demonstration_ids)
        (end_id, _), *_ = ends.most_common(1)
        return UniformEnding(
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            end_id=end_id,
            stop_strings=stop_strings,
            context_length=context_length,
        )

    def text(self, ids: TokenIds) -> str:
        """Text of a completion, without special tokens and without what closed it."""
        ids = self._open(ids)
        return decode(ids, self.tokenizer, skip_special_tokens=True)

    def group(self, group: RolloutGroup) -> RolloutGroup:
        """The group with its completions in the uniform form; log-probabilities no longer belong to them."""
        example, ids = self.example(group.example), [rollout.completion_ids for rollout in group.rollouts]
        rollouts = tuple(
            replace(rollout, completion_ids=self._closed(example, rollout.completion_ids, rollout.given))
            for rollout in group.rollouts
        )
        return replace(group, example=example, rollouts=rollouts, texts=tuple(map(self.text, ids)))

    def example(self, example: Example) -> Example:
        """The example with its demonstration and its rejected completion in the uniform form."""
        demonstration, rejected = (
            None if ids is None else self._closed(example, ids, given)
            for ids, given in (
                (example.demonstration_ids, example.demonstration_given),
                (example.rejected_ids, ()),
            )
        )
        return replace(example, demonstration_ids=demonstration, rejected_ids=rejected)

    def _closed(self, example: Example, ids: TokenIds, given: Given) -> TokenIds:
        ids = self._open(ids)
        text = self._decode(ids)
        again = encode_continuation(text, self.tokenizer)
        # A text that does not survive the round trip (half a character) keeps its ids, and so does one of
        # several turns, whose positions are known.
        ids = again if not given and self._decode(again) == text else ids
        if self.context_length is not None:
            ids = ids[: self.context_length - len(example.prompt_ids) - 1]
        return (*ids, self.end_id)

    def _open(self, ids: TokenIds) -> TokenIds:
        """The completion without what closed it."""
        return ids[: text_length(ids, self.stop_ids, self.stop_strings, self.tokenizer)]

    def _decode(self, ids: Sequence[int]) -> str:
        # Special tokens stay: a policy that writes them differs from the expert.
        return decode(ids, self.tokenizer, clean_up_tokenization_spaces=False)

"""The settings of sampling, which every sampler applies alike, and the end of a completion."""

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from uniapl.config import Config, EvaluationConfig, RolloutConfig
from uniapl.errors import UsageError
from uniapl.rollout import SampledTokens
from uniapl.types import Rollout
from uniapl.untyped import decode, encode, items_of


class StopStrings:
    """Texts that end a completion, found by transformers in its last tokens.

    Only the completion is searched, as in vLLM: a text that begins in the prompt does not end it.
    """

    @staticmethod
    def of(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> "StopStrings | None":
        """The criterion for these texts; None if there are none. See :meth:`__init__`."""
        return StopStrings(strings, tokenizer) if strings else None

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Index the vocabulary.

        Raises:
            UsageError: A text cannot be written with the tokenizer's vocabulary.
        """
        self.strings = tuple(strings)
        for text in self.strings:
            ids = encode(text, tokenizer)
            # Some tokenizers remove white space around a text, which completions may have.
            if text.strip() not in decode(ids, tokenizer, clean_up_tokenization_spaces=False):
                raise UsageError(
                    f"stop_strings: the tokenizer cannot write {text!r}, so no completion would end there"
                )
        try:
            self._criterion = cast("Any", StopStringCriteria)(tokenizer, list(strings))
        except ValueError as error:
            # transformers writes "abcdef" before each token to see its text.
            raise UsageError(
                "stop_strings: the tokenizer cannot write each letter (one with a token per word cannot): "
                "transformers cannot find texts in its tokens; use model.stop_tokens"
            ) from error
        self.width = self._criterion.maximum_token_len
        """Tokens in which the longest of the texts fits."""
        # Beyond the vocabulary: the criterion maps it to a token without text.
        self._nothing = len(self._criterion.embedding_vec)

    def windows(self, rows: int, device: torch.device) -> Tensor:
        """[rows, width], the last tokens of completions that have not begun."""
        return torch.full((rows, self.width), self._nothing, device=device)

    def complete(self, windows: Tensor) -> Tensor:
        """[rows], True if the last token of a window [rows, width] completes one of the texts."""
        return self._criterion(windows, None)

    def end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the first that completes a text; None if no token does."""
        before = [self._nothing] * (self.width - 1)
        # The criterion's tables stay on the device of the sampler.
        device = self._criterion.embedding_vec.device
        tokens = torch.tensor([*before, *ids], device=device)
        complete = items_of(self.complete(tokens.unfold(0, self.width, 1)))
        return complete.index(True) + 1 if True in complete else None


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn and what ends a completion, in every sampler.

    The next token is drawn from the logits after the repetition penalty, the temperature, min-p, top-k and
    top-p, in vLLM's order (transformers' `generate` applies min-p last). Its log-probability is that of the
    policy that is trained: at this temperature, without the penalty and the truncation.
    """

    max_completion_length: int
    stop_ids: Collection[int]
    """Tokens that end a completion and belong to it."""
    temperature: float = 1.0
    """0 takes the most likely token; its log-probability is then the one at temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """For the tokens of the prompt and of the completion."""
    stop_strings: StopStrings | None = None

    @staticmethod
    def of_rollouts(
        config: Config, stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
    ) -> "SamplingSettings":
        """The settings of `rollout`.

        Raises:
            UsageError: The tokenizer cannot write a stop string.
        """
        section = config.rollout
        strings = StopStrings.of(section.stop_strings, tokenizer)
        return SamplingSettings(stop_ids=stop_ids, stop_strings=strings, **_shared(section))

    @staticmethod
    def of_evaluation(
        config: Config, stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
    ) -> "SamplingSettings":
        """The settings of `evaluation`; see :meth:`of_rollouts`."""
        section = config.evaluation
        given = config.rollout.stop_strings if section.stop_strings is None else section.stop_strings
        shared = _shared(section)
        shared["temperature"] = section.sampling_temperature
        return SamplingSettings(stop_ids=stop_ids, stop_strings=StopStrings.of(given, tokenizer), **shared)

    def limited(self, max_completion_length: int | None) -> "SamplingSettings":
        """The settings with another limit of a completion's length; None keeps it."""
        if max_completion_length is None:
            return self
        return replace(self, max_completion_length=max_completion_length)

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values, to compare those of two runs."""
        strings = self.stop_strings.strings if self.stop_strings is not None else ()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"stop_ids": sorted(self.stop_ids), "stop_strings": list(strings)}

    @property
    def logprobs_mode(self) -> str:
        """The mode in which vLLM reports the policy's log-probabilities.

        Processed ones are at the temperature, but after the penalty and the truncation; raw ones are before
        all of them, at temperature 1.
        """
        return "raw_logprobs" if warps(self) else "processed_logprobs"

    @functools.cached_property
    def processors(self) -> LogitsProcessorList:
        """What changes the logits before a token is drawn, or at temperature 0 the largest is taken."""
        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.min_p > 0:
            found.append(MinPLogitsWarper(self.min_p))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(found)

    def rollouts(self, completions: Iterable[SampledTokens], policy_version: int) -> tuple[Rollout, ...]:
        """The rollouts of one prompt, cut after what ends them.

        A sampler may return tokens that it sampled after the end of a completion. A completion that it
        stopped before the length limit has ended, too.
        """
        found: list[Rollout] = []
        limit = self.max_completion_length
        for ids, logprobs in completions:
            end = self._end(ids)
            found.append(
                Rollout(
                    completion_ids=tuple(ids[:end]),
                    sampling_logprobs=tuple(logprobs[:end]),
                    finish_reason="length" if end is None and len(ids) >= limit else "stop",
                    policy_version=policy_version,
                )
            )
        return tuple(found)

    def _end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the first that ends the completion."""
        by_token = next((n for n, token in enumerate(ids, start=1) if token in self.stop_ids), None)
        by_text = self.stop_strings.end(ids) if self.stop_strings is not None else None
        return min((end for end in (by_token, by_text) if end is not None), default=None)


def _shared(section: RolloutConfig | EvaluationConfig) -> dict[str, Any]:
    """The settings that both sections have under the same names."""
    names = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(section, name) for name in names}


def warps(settings: SamplingSettings | RolloutConfig) -> bool:
    """Whether tokens are drawn from another distribution than the policy's at this temperature."""
    used = (settings.top_p, settings.top_k, settings.min_p, settings.repetition_penalty)
    return used != (1, 0, 0, 1)

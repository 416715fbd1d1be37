"""The settings of sampling, which every sampler applies alike, and the end of a completion."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from uniapl.config import Config
from uniapl.rollout import SampledTokens
from uniapl.types import Rollout


class StopStrings:
    """Texts that end a completion, found by transformers in its last tokens.

    Only the completion is searched, as in vLLM: a text that begins in the prompt does not end it.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = tuple(strings)
        self._criterion = StopStringCriteria(tokenizer, list(strings))
        self.width = self._criterion.maximum_token_len
        """Tokens in which the longest of the texts fits."""
        # Beyond the vocabulary: the criterion maps it to a token without text.
        self._nothing = len(self._criterion.embedding_vec)

    def windows(self, rows: int, device: torch.device) -> Tensor:
        """[rows, width], the last tokens of completions that have not begun."""
        return torch.full((rows, self.width), self._nothing, device=device)

    def complete(self, windows: Tensor) -> Tensor:
        """[rows], True if the last token of a window [rows, width] completes one of the texts."""
        return self._criterion(windows, None)  # type: ignore[arg-type]

    def end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the first that completes a text; None if no token does."""
        before = [self._nothing] * (self.width - 1)
        # The criterion's tables stay on the device of the sampler.
        tokens = torch.tensor([*before, *ids], device=self._criterion.embedding_vec.device)
        complete = self.complete(tokens.unfold(0, self.width, 1)).tolist()
        return complete.index(True) + 1 if True in complete else None


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn and what ends a completion.

    A token is drawn from the logits after the repetition penalty, the temperature, top-k, top-p and min-p, in
    this order, as in `generate` of transformers. Its log-probability is that of the full distribution: at
    this temperature, before the penalty and the truncation.
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
        """The settings of `rollout`."""
        rollout = config.rollout
        return SamplingSettings(
            max_completion_length=rollout.max_completion_length,
            stop_ids=stop_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty,
            stop_strings=StopStrings(rollout.stop_strings, tokenizer) if rollout.stop_strings else None,
        )

    @staticmethod
    def of_evaluation(
        config: Config, stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase
    ) -> "SamplingSettings":
        """The settings of `evaluation`, with the stop strings of `rollout` if it has none."""
        evaluation = config.evaluation
        strings = evaluation.stop_strings or config.rollout.stop_strings
        return SamplingSettings(
            max_completion_length=evaluation.max_completion_length,
            stop_ids=stop_ids,
            temperature=evaluation.sampling_temperature,
            top_p=evaluation.top_p,
            top_k=evaluation.top_k,
            min_p=evaluation.min_p,
            repetition_penalty=evaluation.repetition_penalty,
            stop_strings=StopStrings(strings, tokenizer) if strings else None,
        )

    @property
    def logprobs_mode(self) -> str:
        """The log-probabilities that vLLM has to report: those of the full distribution.

        Before truncation it reports those at temperature 1, after it those of what is left.
        """
        whole = (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1, 0, 0, 1)
        return "processed_logprobs" if whole else "raw_logprobs"

    def rollouts(self, completions: Iterable[SampledTokens], policy_version: int) -> tuple[Rollout, ...]:
        """The rollouts of one prompt, cut after what ends them. Without an end, the length limit was reached.

        A sampler may return tokens that it sampled after the end of a completion.
        """
        found: list[Rollout] = []
        for ids, logprobs in completions:
            end = self._end(ids)
            found.append(
                Rollout(
                    completion_ids=tuple(ids[:end]),
                    sampling_logprobs=tuple(logprobs[:end]),
                    finish_reason="length" if end is None else "stop",
                    policy_version=policy_version,
                )
            )
        return tuple(found)

    def _end(self, ids: Sequence[int]) -> int | None:
        """Number of tokens up to and including the first that ends the completion."""
        by_token = next((n for n, token in enumerate(ids, start=1) if token in self.stop_ids), None)
        by_text = self.stop_strings.end(ids) if self.stop_strings is not None else None
        return min((end for end in (by_token, by_text) if end is not None), default=None)

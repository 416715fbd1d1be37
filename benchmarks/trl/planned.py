"""Completions of planned lengths for both libraries: each is forced to end exactly at its planned length."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from work import EOS

from uniapl.rollout.local import LocalSampler


class Plan:
    """The lengths of all completions of a run, assigned in the order in which they are sampled."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.position = lengths, 0

    def take(self, rows: int) -> list[int]:
        start = self.position
        self.position += rows
        return self.lengths[start : self.position]


def end_where(logits: Tensor, ending: Tensor) -> Tensor:
    """Change logits [R, V] in place so that exactly the rows selected by `ending` [R] draw the end token."""
    logits[:, EOS] = torch.where(ending, torch.finfo(logits.dtype).max, -torch.inf)
    return logits


class PlannedEnd(LogitsProcessor):
    """Ends the completions of one call of transformers' generate at their planned lengths."""

    def __init__(self, lengths: list[int], prompt_length: int, device: torch.device) -> None:
        self.last = torch.tensor(lengths, device=device) - 1
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return end_where(scores, self.last == input_ids.shape[1] - self.prompt_length)


@contextmanager
def our_sampler_planned(plan: Plan) -> Iterator[None]:
    """Make UniAPL's sampler end completions as planned: a uniform number of 1 or more marks the end."""
    uniforms, choose = LocalSampler._uniforms, LocalSampler._choose

    def planned_uniforms(self: LocalSampler, seeds: list[int], num_generations: int) -> Tensor:
        drawn = uniforms(self, seeds, num_generations)
        # The single token that is sampled as a check before a run is not part of the plan.
        if self.max_completion_length > 1:
            lengths = torch.tensor(plan.take(len(drawn)))
            drawn[torch.arange(len(drawn)), lengths - 1] += 1
        return drawn

    def planned_choice(self: LocalSampler, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return choose(self, end_where(logits, numbers >= 1), numbers.frac())

    with (
        mock.patch.object(LocalSampler, "_uniforms", planned_uniforms),
        mock.patch.object(LocalSampler, "_choose", planned_choice),
    ):
        yield


@contextmanager
def continuous_batching_planned(plan: Plan) -> Iterator[None]:
    """Make continuous batching end completions as planned.

    It has no planned end, so each request gets the planned length as its maximum and no end token.
    """
    add = ContinuousBatchingManager.add_request

    def planned_add(self: ContinuousBatchingManager, **request: object) -> object:
        request |= {"max_new_tokens": plan.take(1)[0], "eos_token_id": -1}
        return add(self, **request)

    with mock.patch.object(ContinuousBatchingManager, "add_request", planned_add):
        yield

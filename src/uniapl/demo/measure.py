"""Measure a model on held-out prompts: constraints, fluency, and closeness to the expert."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.data.batching import Row, demonstration_rows, micro_batches
from uniapl.data.rows import tokenize_rows
from uniapl.demo import metrics
from uniapl.demo.constraints import TaskPrompt
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH
from uniapl.demo.task import as_row
from uniapl.models.policy import Policy
from uniapl.rollout import SampleRequest
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.types import derive_seed


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurements of one text per prompt, sampled at temperature 1."""

    passed: float
    """Fraction of texts that satisfy every constraint of their prompt."""
    fluency: float
    """Mean fraction of well-formed, distinct sentences."""
    good: float
    """Fraction of texts that satisfy every constraint and whose fluency is 1."""
    words: float
    """Mean length in words, including full stops."""
    length_distance: float
    """Wasserstein-1 distance between the lengths of these texts and of the expert's, in words."""
    place_habit: float
    """Fraction of texts that mention a place although the prompt leaves it open: a habit of the expert."""
    expert_nll: float
    """Nats per token of the expert's texts under the model."""
    distinct: float
    """Fraction of distinct texts."""
    distinct_2: float
    """Fraction of distinct pairs of neighbouring words in all texts (Li et al., 2016)."""
    reference_nll: float | None = None
    """Nats per token of these texts under a reference model of the expert."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert_texts: dict[TaskPrompt, str],
    *,
    seed: int = 0,
    reference: PreTrainedModel | None = None,
) -> tuple[Measurement, list[str]]:
    """Sample one text per prompt and measure the texts.

    Args:
        expert_texts: The prompts with the expert's texts.
        reference: A model of the expert, to measure the log-probability of the texts.

    Returns:
        The measurement and the texts.
    """
    rows = [as_row(prompt, text) for prompt, text in expert_texts.items()]
    examples = tokenize_rows(enumerate(rows, start=1), tokenizer, DataConfig()).examples
    assert isinstance(tokenizer.eos_token_id, int)
    assert isinstance(tokenizer.pad_token_id, int)
    sampler = LocalSampler(
        model=model,
        settings=SamplingSettings(
            max_completion_length=MAX_COMPLETION_LENGTH, stop_ids={tokenizer.eos_token_id}
        ),
        pad_id=tokenizer.pad_token_id,
    )
    groups = sampler.sample(
        SampleRequest(
            prompts=[example.prompt_ids for example in examples],
            seeds=[derive_seed(seed, "measure", index) for index in range(len(examples))],
            num_generations=1,
        )
    )
    texts = [str(tokenizer.decode(list(g[0].completion_ids), skip_special_tokens=True)) for g in groups]
    expert_rows = [row for example in examples for row in demonstration_rows(example)]
    nll = nll_of(model, expert_rows, tokenizer.pad_token_id)
    measurement = score_texts(list(expert_texts), texts, list(expert_texts.values()), expert_nll=nll)
    if reference is not None:
        sampled = [
            replace(row, completion_ids=group[0].completion_ids)
            for row, group in zip(expert_rows, groups, strict=True)
        ]
        nll = nll_of(reference, sampled, tokenizer.pad_token_id)
        measurement = replace(measurement, reference_nll=nll)
    return measurement, texts


def score_texts(
    prompts: Sequence[TaskPrompt], texts: Sequence[str], expert_texts: Sequence[str], *, expert_nll: float
) -> Measurement:
    """Measure texts, compared with the expert's texts for the same prompts."""
    constraints = [as_row(prompt)["constraints"] for prompt in prompts]
    fluent = metrics.fluent(list(texts))
    habits = metrics.place_habit(list(texts), constraints)
    lengths = sorted(len(text.split()) for text in texts)
    expert_lengths = sorted(len(text.split()) for text in expert_texts)
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return Measurement(
        passed=statistics.fmean(metrics.passed(list(texts), constraints)),
        fluency=statistics.fmean(fluent),
        good=statistics.fmean(metrics.good(list(texts), constraints)),
        words=statistics.fmean(lengths),
        length_distance=statistics.fmean(abs(a - b) for a, b in zip(lengths, expert_lengths, strict=True)),
        place_habit=statistics.fmean(habit for habit in habits if habit is not None),
        expert_nll=expert_nll,
        distinct=len(set(texts)) / len(texts),
        distinct_2=len(set(pairs)) / max(1, len(pairs)),
    )


@torch.no_grad()
def nll_of(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> float:
    """Nats per token of the demonstrations in the rows, under the model."""
    policy = Policy(model)
    total, count = 0.0, 0
    for batch in micro_batches(rows, pad_id=pad_id, max_tokens=2048, device=model.device):
        inputs = (batch.input_ids, batch.attention_mask, batch.position_ids)
        logprobs, _ = policy(*inputs, batch.sft_mask, batch.temperature)
        total -= float(torch.where(batch.sft_mask, logprobs, 0.0).sum())
        count += int(batch.sft_mask.sum())
    return total / count

"""How good, how fluent, how close to the expert: what a model's texts are worth, on prompts it never saw."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import DataConfig
from uniapl.data.batching import Row, demonstration_row, micro_batches
from uniapl.data.rows import tokenize_rows
from uniapl.demo.constraints import Prompt
from uniapl.demo.language import PLACES, fluency
from uniapl.demo.recipe import MAX_COMPLETION_LENGTH
from uniapl.demo.task import as_row
from uniapl.models.policy import Policy
from uniapl.rollout.local import LocalSampler
from uniapl.types import derive_seed


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One text per prompt, sampled at temperature 1, and what they are worth."""

    texts: tuple[str, ...]
    passed: float
    """Share of texts that satisfy every constraint of their prompt."""
    fluency: float
    """Mean share of well-formed, distinct sentences."""
    good: float
    """Share of texts that pass and are fluent throughout."""
    words: float
    """Mean length, full stops included."""
    length_distance: float
    """Wasserstein-1 distance between the lengths of these texts and of the expert's, in words."""
    place_habit: float
    """Share of texts that mention a place where the prompt leaves it free: the expert's habit."""
    expert_nll: float
    """Nats per token of the expert's texts under the model."""
    distinct: float
    """Share of distinct texts."""
    distinct_2: float
    """Distinct pairs of neighbouring words, as a share of all such pairs in all texts (Li et al., 2016)."""
    reference_nll: float | None = None
    """Nats per token of these texts under a reference model of the expert."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert_texts: dict[Prompt, str],
    *,
    seed: int = 0,
    reference: PreTrainedModel | None = None,
) -> Measurement:
    """Measure a model on prompts with the expert's texts for them.

    Args:
        reference: A model of the expert, to ask how likely it finds the texts.
    """
    prompts = list(expert_texts)
    rows = [as_row(prompt, text) for prompt, text in expert_texts.items()]
    examples = tokenize_rows(enumerate(rows, start=1), tokenizer, DataConfig()).examples
    assert isinstance(tokenizer.eos_token_id, int)
    assert isinstance(tokenizer.pad_token_id, int)
    sampler = LocalSampler(
        model=model,
        stop_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    groups = sampler.sample(
        [example.prompt_ids for example in examples],
        seeds=[derive_seed(seed, "measure", index) for index in range(len(examples))],
        num_generations=1,
        policy_version=0,
    )
    texts = [str(tokenizer.decode(list(g[0].completion_ids), skip_special_tokens=True)) for g in groups]
    expert_rows = [demonstration_row(example) for example in examples]
    judged = score_texts(
        prompts,
        texts,
        list(expert_texts.values()),
        expert_nll=_nll(model, expert_rows, tokenizer.pad_token_id),
    )
    if reference is None:
        return judged
    sampled = [
        replace(row, completion_ids=group[0].completion_ids)
        for row, group in zip(expert_rows, groups, strict=True)
    ]
    return replace(judged, reference_nll=_nll(reference, sampled, tokenizer.pad_token_id))


def score_texts(
    prompts: Sequence[Prompt], texts: Sequence[str], expert_texts: Sequence[str], *, expert_nll: float
) -> Measurement:
    """What texts are worth for their prompts, beside the expert's texts for the same prompts."""
    passed = [
        all(constraint.satisfied_by(text) for constraint in prompt.constraints)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    fluent = [fluency(text) for text in texts]
    lengths = sorted(len(text.split()) for text in texts)
    expert_lengths = sorted(len(text.split()) for text in expert_texts)
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    free = [t for p, t in zip(prompts, texts, strict=True) if not _speaks_of_places(p)]
    return Measurement(
        texts=tuple(texts),
        passed=statistics.fmean(passed),
        fluency=statistics.fmean(fluent),
        good=statistics.fmean(p and f == 1 for p, f in zip(passed, fluent, strict=True)),
        words=statistics.fmean(lengths),
        length_distance=statistics.fmean(abs(a - b) for a, b in zip(lengths, expert_lengths, strict=True)),
        place_habit=statistics.fmean(any(word in PLACES for word in text.split()) for text in free),
        expert_nll=expert_nll,
        distinct=len(set(texts)) / len(texts),
        distinct_2=len(set(pairs)) / max(1, len(pairs)),
    )


def _speaks_of_places(prompt: Prompt) -> bool:
    """Whether the prompt asks for a place, forbids them, or has no room for one."""
    return any(
        c.kind in ("place", "max_words") or c.argument == "place" or c.argument in PLACES
        for c in prompt.constraints
    )


@torch.no_grad()
def _nll(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> float:
    policy = Policy(model)
    total, count = 0.0, 0
    for batch in micro_batches(rows, pad_id=pad_id, max_tokens=2048, device=model.device):
        inputs = (batch.input_ids, batch.attention_mask, batch.position_ids)
        logprobs, _ = policy(*inputs, batch.sft_mask, batch.temperature)
        total -= float(torch.where(batch.sft_mask, logprobs, 0.0).sum())
        count += int(batch.sft_mask.sum())
    return total / count

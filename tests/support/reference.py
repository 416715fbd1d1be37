"""The formulas in plain Python floats and loops, written from the papers, to hold the tensors against."""

import math
from collections.abc import Sequence


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    log_partition = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - log_partition for x in scaled]


def entropy(logits: list[float], temperature: float) -> float:
    return -sum(math.exp(x) * x for x in log_softmax(logits, temperature))


def group_advantages(rewards: Sequence[float | None], scale: str) -> list[float]:
    known = [r for r in rewards if r is not None]
    if not known or max(known) == min(known):
        return [0.0] * len(rewards)
    mean = sum(known) / len(known)
    divisor = 1.0
    if scale == "group":
        divisor = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)) + 1e-4
    return [0.0 if r is None else (r - mean) / divisor for r in rewards]


def sft(logprobs: list[list[float]], mask: list[list[bool]], weight: str) -> float:
    total = 0.0
    for row, row_mask in zip(logprobs, mask, strict=True):
        for logprob, use in zip(row, row_mask, strict=True):
            if use:
                p = math.exp(logprob)
                w = {"none": 1.0, "is": p, "phi": p * (1 - p), "luffy": p / (p + 0.1)}[weight]
                total += -w * logprob
    return total


def surrogate(
    logprobs: list[list[float]],
    old: list[list[float]],
    advantages: list[float],
    mask: list[list[bool]],
    low: float,
    high: float,
    weights: list[list[float]] | None = None,
) -> float:
    total = 0.0
    for b, row in enumerate(logprobs):
        for t, logprob in enumerate(row):
            if mask[b][t]:
                ratio = math.exp(logprob - old[b][t])
                clipped = min(max(ratio, 1 - low), 1 + high)
                weight = 1.0 if weights is None else weights[b][t]
                total += -weight * min(ratio * advantages[b], clipped * advantages[b])
    return total


def policy_loss(
    completions: list[tuple[list[float], list[float], float]],
    loss_type: str,
    level: str,
    low: float,
    high: float,
    max_length: int,
) -> float:
    """Loss of completions, each as its log-probabilities, its old ones and its advantage."""
    means: list[float] = []
    sums: list[float] = []
    for logprobs, old, advantage in completions:
        log_ratios = [p - q for p, q in zip(logprobs, old, strict=True)]
        if level == "sequence":
            log_ratios = [sum(log_ratios) / len(log_ratios)] * len(log_ratios)
        terms: list[float] = []
        for log_ratio in log_ratios:
            ratio = math.exp(log_ratio)
            terms.append(-min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage))
        sums.append(sum(terms))
        means.append(sum(terms) / len(terms))
    if loss_type == "grpo":
        return sum(means) / len(means)
    if loss_type == "dr_grpo":
        return sum(sums) / (len(sums) * max_length)
    return sum(sums) / sum(len(logprobs) for logprobs, _, _ in completions)


def batch_std(values: list[float]) -> float:
    mean = sum(values) / len(values) if values else 0.0
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def decoupled_advantages(
    parts: Sequence[Sequence[Sequence[float | None]]], weights: list[float]
) -> list[list[float]]:
    """GDPO, from the values of each function for each group."""
    groups: list[list[float | None]] = []
    for number in range(len(parts[0])):
        normalised = [group_advantages(part[number], "group") for part in parts]
        groups.append(
            [
                sum(w * n[i] for w, n in zip(weights, normalised, strict=True))
                if any(part[number][i] is not None for part in parts)
                else None
                for i in range(len(parts[0][number]))
            ]
        )
    std = batch_std([v for group in groups for v in group if v is not None])
    return [[0.0 if v is None else v / (std + 1e-4) for v in group] for group in groups]


def importance(old: float, sampling: float, cap: float) -> float:
    return min(math.exp(old - sampling), cap)


def k3(logprobs: list[list[float]], ref: list[list[float]], mask: list[list[bool]]) -> float:
    total = 0.0
    for b, row in enumerate(logprobs):
        for t, logprob in enumerate(row):
            if mask[b][t]:
                r = math.exp(ref[b][t] - logprob)
                total += r - 1 - math.log(r)
    return total


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))

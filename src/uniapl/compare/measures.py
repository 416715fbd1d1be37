"""Numbers from the completions of a model: scores, closeness to the expert, diversity, truncation."""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uniapl.compare.sampling import TOOL_USE, VALIDATION, Sample
from uniapl.errors import UniAPLError
from uniapl.report.analysis import distinct, wasserstein

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(texts, expert's texts) -> a similarity for each pair."""

SAME = 0.9
"""Similarity from which two of the expert's texts are taken as answers to the same question. Our choice."""
DESCRIPTIONS = {
    "expert_nll": "nats per token of the expert's held-out completions under the model; lower is closer",
    "length_distance": "Wasserstein-1 distance of the completion lengths from the expert's, in tokens",
    "logprob_distance": "Wasserstein-1 distance of the completions' mean log-probabilities under the base "
    "model from those of the expert's completions, in nats per token",
    "distinct_2": "fraction of distinct pairs of neighbouring words among all pairs (Li et al., 2016)",
    "truncated": "fraction of completions that are cut at the token limit",
    "tokens": "mean length of a completion, in tokens",
    "calls": "tool calls per completion that were executed",
    "failed": "tool calls per completion that failed: an unknown tool, an exception or a time-out",
    "malformed": "fraction of completions that end in a tool call that cannot be read",
    "unanswered": "tool calls per completion after rollout.max_tool_calling_iterations",
    "judge": "mean similarity of the completions to the expert's, by the judge",
    "on_topic": "fraction of completions that the judge finds more similar to the expert's than 95 % of the "
    "expert's completions of other prompts",
}
"""The measures and their meanings."""


def scores(sample: Sample) -> dict[str, dict[str, dict[str, Any]]]:
    """Suite -> score -> its mean, and the standard error of the mean over prompts (None for one prompt)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for suite, entry in sample.items():
        values = {name: [(s, n) for s, n in pairs if n] for name, pairs in entry["scores"].items()}
        found[suite] = {
            name: {"mean": sum(s for s, _ in pairs) / sum(n for _, n in pairs), "prompt_error": _error(pairs)}
            for name, pairs in values.items()
            if pairs
        }
    return found


def _error(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < 2:
        return None
    return statistics.stdev(s / n for s, n in pairs) / math.sqrt(len(pairs))


def closeness(sample: Sample) -> dict[str, float]:
    """The measures without a judge, over all suites; those that need the expert over prompts that have
    one."""
    found = {
        "truncated": statistics.fmean(_all(sample, "truncated")),
        "tokens": statistics.fmean(_all(sample, "tokens")),
    }
    if used := [entry["tools"] for entry in sample.values() if "tools" in entry]:
        found |= {name: statistics.fmean(n for tools in used for n in tools[name]) for name in TOOL_USE}
    diversity = distinct(_all(sample, "texts"), 2)
    if diversity is not None:
        found["distinct_2"] = diversity
    experts = {
        suite: entry["expert"] for suite, entry in sample.items() if entry.get("expert", {}).get("index")
    }
    if experts:
        expert_tokens, logprobs, base = (
            [value for expert in experts.values() for value in expert[key]]
            for key in ("tokens", "logprobs", "base_logprobs")
        )
        ours = {key: _of_experts(sample, experts, key) for key in ("tokens", "base_logprobs")}
        total = sum(count * mean for count, mean in zip(expert_tokens, logprobs, strict=True))
        found["expert_nll"] = -total / sum(expert_tokens)
        found["length_distance"] = wasserstein(ours["tokens"], expert_tokens)
        found["logprob_distance"] = wasserstein(ours["base_logprobs"], base)
    return found


def judged(sample: Sample, final: Sample, judge: Judge) -> dict[str, float]:
    """The measures of the judge, over the prompts that have an expert's text.

    `on_topic` compares with a threshold: the 95 % quantile of the similarities of each expert's text to that
    of another prompt, drawn at random. Texts that are nearly the same answer the same question (a suite may
    ask it several times in other words), and are not used for it.

    Args:
        final: The sample of the same suites that has the expert's texts.
    """
    experts = {suite: entry["expert"] for suite, entry in final.items()}
    known = [text for expert in experts.values() for text in expert["texts"]]
    ours = _of_experts(sample, experts, "texts")
    samples = len(ours) // len(known)
    similarities = judge(ours, [text for text in known for _ in range(samples)])
    found = {"judge": statistics.fmean(similarities)}
    if len(known) > 1:
        order = random.Random(0).sample(known, len(known))
        others = sorted(value for value in judge(order, [*order[1:], order[0]]) if value < SAME)
        if others:
            threshold = others[math.ceil(0.95 * len(others)) - 1]
            found["on_topic"] = statistics.fmean(value > threshold for value in similarities)
    return found


def _of_experts(sample: Sample, experts: Mapping[str, Any], key: str) -> list[Any]:
    """The values of the completions whose prompts have an expert's completion."""
    found: list[Any] = []
    for suite, expert in experts.items():
        entry = sample[suite]
        samples = len(entry["texts"]) // len(next(iter(entry["scores"].values())))
        for index in expert["index"]:
            found += entry[key][index * samples : (index + 1) * samples]
    return found


def criterion(outcome: Mapping[str, Any]) -> float:
    """What the search maximises: the main score of the validation prompts, or minus the expert's nll.

    Raises:
        UniAPLError: Nothing scores the validation prompts.
    """
    sample = outcome["final"]
    found = scores(sample)[VALIDATION].get(sample[VALIDATION]["headline"])
    if found is not None and found["mean"] is not None:
        return found["mean"]
    nll = closeness(sample).get("expert_nll")
    if nll is None:
        raise UniAPLError("--search: no reward, metric or demonstration scores the validation prompts")
    return -nll


def _all(sample: Sample, key: str) -> list[Any]:
    return [value for entry in sample.values() for value in entry[key]]

"""One suite and one model: sample, decode, score, and what the scores are worth."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.evaluation import scores
from uniapl.evaluation.suites import AT_ONCE, Suite
from uniapl.rollout import Sampler, SampleRequest
from uniapl.types import Example, Rollout, derive_seed, prompt_text

CONSTANT = '"<<ok>> *a* *b* *c* [x] [y] [z] P.S. ok. ok. ok"'
"""One answer to every prompt that satisfies many formal constraints, and says nothing."""


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What a model did on a suite."""

    summary: dict[str, Any]
    """As it stands in results.json."""
    completions: list[dict[str, Any]]
    """Every answer with its scores."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a training run's metrics."""
        means = {name: value["mean"] for name, value in self.summary["scores"].items()}
        means |= {key: self.summary[key] for key in ("mean_length", "truncated", "unscored")}
        return {name: float(value) for name, value in means.items() if value is not None}


def evaluate_suite(
    suite: Suite,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int = 1,
    seed: int = 0,
    with_floors: bool = True,
    advance: Callable[[float], None] = lambda prompts: None,
) -> SuiteResult:
    """Answers to every prompt of a suite, and their scores.

    Args:
        sampler: The model's; greedy or not is its own matter.
        num_samples: Answers per prompt, k in pass@k.
        with_floors: Score answers that took no model, too.
        advance: Told how many more prompts have been answered.
    """
    examples = suite.examples
    groups = _answers(suite, sampler, num_samples, seed, advance)
    texts = [[_decode(tokenizer, rollout) for rollout in group] for group in groups]
    flat, failure = suite.score(
        [example for example in examples for _ in range(num_samples)],
        [text for group in texts for text in group],
        [rollout.completion_ids for group in groups for rollout in group],
    )
    scored = [flat[i * num_samples : (i + 1) * num_samples] for i in range(len(examples))]
    rollouts = [rollout for group in groups for rollout in group]
    summary: dict[str, Any] = {
        "prompts": len(examples),
        "left_out": {reason: list(numbers) for reason, numbers in suite.left_out.items()},
        "samples": num_samples,
        "headline": suite.headline,
        "scores": {name: scores.interval(scores.sums_of(scored, name)) for name in flat[0]},
        "mean_length": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
        "mean_words": sum(len(text.split()) for group in texts for text in group) / len(rollouts),
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "unscored": sum(not answer[suite.headline] for answer in flat) / len(rollouts),
        "per_prompt": {name: scores.sums_of(scored, name).tolist() for name in flat[0]},
        "prompts_digest": [_digest(example) for example in examples],
        "notes": [*suite.notes, *_remarks(suite, texts, failure)],
    }
    if num_samples > 1:
        best = scores.pass_at_all(scored, suite.headline)
        kind = "best" if suite.headline == "reward" else "pass"
        summary["scores"][f"{suite.headline}_{kind}@{num_samples}"] = scores.interval(best)
    if with_floors:
        summary["floors"] = floors(suite, tokenizer)
    completions = [
        {
            "suite": suite.name,
            "row": example.row,
            "prompt": example.prompt,
            "completion": text,
            "finish_reason": rollout.finish_reason,
            **{name: list(values) for name, values in answer.items()},
        }
        for example, group, answers, rolled in zip(examples, texts, scored, groups, strict=True)
        for text, answer, rollout in zip(group, answers, rolled, strict=True)
    ]
    return SuiteResult(summary=summary, completions=completions)


def _answers(
    suite: Suite, sampler: Sampler, num_samples: int, seed: int, advance: Callable[[float], None]
) -> list[tuple[Rollout, ...]]:
    """Some prompts at a time, of like length, so that it can be seen how far it is."""
    examples = suite.examples
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt_ids))
    found: dict[int, tuple[Rollout, ...]] = {}
    for start in range(0, len(order), AT_ONCE):
        chosen = order[start : start + AT_ONCE]
        groups = sampler.sample(
            SampleRequest(
                prompts=[examples[place].prompt_ids for place in chosen],
                seeds=[derive_seed(seed, "evaluate", suite.name, examples[place].row) for place in chosen],
                num_generations=num_samples,
            )
        )
        found |= dict(zip(chosen, groups, strict=True))
        advance(len(chosen))
    return [found[place] for place in range(len(examples))]


def floors(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float | None]]:
    """What answers score that no model wrote: nothing, the prompt itself, and one constant text."""
    prompts = [prompt_text(example.prompt) for example in suite.examples]
    # Where only what stands behind a mark is judged, they stand behind it.
    mark = suite.answer_after or ""
    answers = {
        name: [mark + text for text in texts]
        for name, texts in (
            ("empty", [""] * len(prompts)),
            ("echo", prompts),
            ("constant", [CONSTANT] * len(prompts)),
        )
    }
    found: dict[str, dict[str, float | None]] = {}
    for name, texts in answers.items():
        ids: list[list[int]] = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        scored, _ = suite.score(suite.examples, texts, ids)
        found[name] = {
            score: scores.mean_of(scores.sums_of([[one] for one in scored], score)) for score in scored[0]
        }
    return found


def _remarks(suite: Suite, texts: Sequence[Sequence[str]], failure: str | None) -> list[str]:
    said = [f"scoring failed: {failure}"] if failure else []
    if suite.answer_after is not None:
        without = [text for group in texts for text in group if suite.answer_after not in text]
        if without:
            share = len(without) / sum(len(group) for group in texts)
            said.append(f"{share:.0%} of the answers never came to '{suite.answer_after}' and count as empty")
    return said


def _digest(example: Example) -> str:
    """What a prompt is known by in another run's results."""
    text = json.dumps(example.prompt, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _decode(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    return str(tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True))


def paired(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Score -> our mean minus theirs with its interval, over the prompts that both summaries have."""
    places: dict[str, list[int]] = {}
    for place, digest in enumerate(theirs["prompts_digest"]):
        places.setdefault(digest, []).append(place)
    # A prompt may stand there twice: the first belongs to the first.
    common = [(i, places[d].pop(0)) for i, d in enumerate(ours["prompts_digest"]) if places.get(d)]
    found: dict[str, dict[str, float | None]] = {}
    for name, sums in ours["per_prompt"].items():
        if common and name in theirs["per_prompt"]:
            a = scores.as_sums([sums[i] for i, _ in common])
            b = scores.as_sums([theirs["per_prompt"][name][j] for _, j in common])
            found[name] = scores.difference(a, b)
    return found

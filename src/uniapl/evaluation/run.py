"""Evaluation of one model on one suite: sampling, scoring and statistics."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from uniapl.data.tokenization import encode_continuation
from uniapl.evaluation import scores
from uniapl.evaluation.suites import BATCH_SIZE, INSTRUCTION_SCORES, Scores, Suite
from uniapl.rewards.builtin import completion_text
from uniapl.rewards.calls import Completion
from uniapl.rollout import Sampler, SampleRequest
from uniapl.tools.environments import Episodes
from uniapl.tools.metrics import tool_metrics
from uniapl.types import Example, Rollout, derive_seed, prompt_text

CONSTANT = '"<<ok>> *a* *b* *c* [x] [y] [z] P.S. ok. ok. ok"'
"""A text without content that satisfies many formal constraints."""


def _unchanged(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a suite's prompts that this process samples and scores."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = _unchanged
    """Returns the items of all processes, which call it together."""


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The result of a model on a suite."""

    summary: dict[str, Any]
    """The suite's entry in results.json."""
    completions: list[dict[str, Any]]
    """Every completion with its scores: the lines of completions.jsonl."""
    rollouts: list[Rollout]
    """The completions as sampled."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for a training run's metrics."""
        means = {name: value["mean"] for name, value in self.summary["scores"].items()}
        means |= {key: self.summary[key] for key in ("mean_length", "truncated", "unscored")}
        means |= self.summary["tools"]
        return {name: float(value) for name, value in means.items() if value is not None}


class _Group(NamedTuple):
    """The rollouts of a prompt, with their environments if the suite has one."""

    rollouts: tuple[Rollout, ...]
    environments: tuple[Any, ...] = ()


def evaluate_suite(
    suite: Suite,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int = 1,
    seed: int = 0,
    with_floors: bool = True,
    advance: Callable[[float], None] = lambda prompts: None,
    part: Part = WHOLE,
) -> SuiteResult:
    """Sample completions of every prompt of a suite, and score them.

    Several processes divide the prompts between them; each of them returns the complete result, which does
    not depend on their number.

    Args:
        sampler: Samples from the model; its own settings determine whether it is greedy.
        num_samples: Completions per prompt, k in pass@k.
        with_floors: Also score baselines that use no model.
        advance: Called with the number of prompts of each finished batch.
        part: This process's part of the prompts.
    """
    examples = [example for example in suite.examples for _ in range(num_samples)]
    sampled = _sample(suite, sampler, num_samples, seed, advance, part)
    rollouts, texts, flat, failure = _scored(suite, tokenizer, sampled, part)
    scored = [flat[start : start + num_samples] for start in range(0, len(flat), num_samples)]
    sums = {name: scores.sums_of(scored, name) for name in flat[0]}
    kind = "pass" if suite.headline in INSTRUCTION_SCORES else "best"
    best = f"{suite.headline}_{kind}@{num_samples}"
    if num_samples > 1:
        sums[best] = scores.pass_at_all(scored, suite.headline)
    summary: dict[str, Any] = {
        "prompts": len(suite.examples),
        "left_out": {reason: list(numbers) for reason, numbers in suite.left_out.items()},
        "samples": num_samples,
        "headline": suite.headline,
        "scores": {name: scores.interval(values) for name, values in sums.items()},
        "mean_length": sum(r.num_sampled for r in rollouts) / len(rollouts),
        "mean_words": sum(len(text.split()) for text in map(_written, rollouts, texts)) / len(rollouts),
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "tools": tool_metrics(rollouts),
        "unscored": sum(not values[suite.headline] for values in flat) / len(rollouts),
        "per_prompt": {name: values.tolist() for name, values in sums.items()},
        "prompts_digest": [_digest(example) for example in suite.examples],
        "notes": [*suite.notes, *([f"scoring failed: {failure}"] if failure else [])],
    }
    answers = map(completion_text, map(_completion, rollouts, texts))
    unmarked = sum(suite.answer_after not in text for text in answers) if suite.answer_after else 0
    if unmarked:
        summary["notes"].append(
            f"{unmarked:,} of {len(texts):,} completions do not contain '{suite.answer_after}' and count as "
            "empty"
        )
    if num_samples > 1 and (bounds := scores.pass_bounds(scored, suite.headline)):
        summary["scores"][best]["bounds"] = list(bounds)
        summary["notes"].append(_unknown_note(best, sums[best], bounds))
    if with_floors:
        summary["floors"] = floors(suite, tokenizer)
    completions = [_record(suite.name, *one) for one in zip(examples, texts, rollouts, flat, strict=True)]
    return SuiteResult(summary=summary, completions=completions, rollouts=rollouts)


def _record(suite: str, example: Example, text: str, rollout: Rollout, values: Scores) -> dict[str, Any]:
    """A completion as a line of a file."""
    return {
        "suite": suite,
        "row": example.row,
        "prompt": example.prompt,
        "completion": text,
        **({"messages": list(rollout.messages)} if rollout.messages else {}),
        "finish_reason": rollout.finish_reason,
        **{name: list(one) for name, one in values.items()},
    }


def _sample(
    suite: Suite,
    sampler: Sampler,
    num_samples: int,
    seed: int,
    advance: Callable[[float], None],
    part: Part,
) -> dict[int, _Group]:
    """Index of a prompt -> its `num_samples` rollouts, for the prompts of this process.

    The prompts are sampled in batches of similar length, and each batch is divided between the processes, so
    that all of them call the sampler equally often and have equally much to do.
    """
    examples = suite.examples
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt_ids))
    found: dict[int, _Group] = {}
    size = BATCH_SIZE * part.world_size
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        mine = batch[part.rank :: part.world_size]
        own, environment = [examples[index] for index in mine], suite.environment
        episodes = Episodes(environment=environment, examples=own, count=num_samples) if environment else None
        groups = sampler.sample(
            SampleRequest(
                prompts=[examples[index].prompt_ids for index in mine],
                seeds=[derive_seed(seed, "evaluate", suite.name, examples[index].row) for index in mine],
                num_generations=num_samples,
                begin=episodes.begin if episodes else None,
            )
        )
        instances = episodes.instances if episodes else [()] * len(mine)
        found |= zip(mine, map(_Group, groups, instances), strict=True)
        advance(len(batch))
    return found


def _scored(
    suite: Suite, tokenizer: PreTrainedTokenizerBase, sampled: dict[int, _Group], part: Part
) -> tuple[list[Rollout], list[str], list[Scores], str | None]:
    """Rollouts, texts and scores of all prompts in their order, and the first failure.

    Args:
        sampled: Index of a prompt -> its rollouts, for the prompts of this process.
    """
    indices = [index for index in sorted(sampled) for _ in sampled[index].rollouts]
    rollouts = [rollout for index in sorted(sampled) for rollout in sampled[index].rollouts]
    environments = [one for index in sorted(sampled) for one in sampled[index].environments]
    texts = [str(tokenizer.decode(list(r.completion_ids), skip_special_tokens=True)) for r in rollouts]
    scored, failure = suite.score(
        [suite.examples[index] for index in indices],
        [*map(_completion, rollouts, texts)],
        [rollout.completion_ids for rollout in rollouts],
        environments if suite.environment else None,
    )
    gathered = part.gather([*zip(indices, rollouts, texts, scored, strict=True)])
    # A stable sort: all completions of a prompt come from one process.
    _, rollouts, texts, scored = map(list, zip(*sorted(gathered, key=lambda entry: entry[0]), strict=True))
    return rollouts, texts, scored, next(filter(None, part.gather([failure])), None)


def _completion(rollout: Rollout, text: str) -> Completion:
    """What reward functions score: the messages of a rollout with tools, whose last one is the answer."""
    return list(rollout.messages) or text


def _written(rollout: Rollout, text: str) -> str:
    """The text of a completion without the results of tools."""
    turns = [str(message["content"]) for message in rollout.messages if message["role"] == "assistant"]
    return "\n".join(turns) or text


def floors(suite: Suite, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float | None]]:
    """Mean scores of completions that use no model: an empty one, the prompt itself, and a constant text."""
    prompts = [prompt_text(example.prompt) for example in suite.examples]
    size = len(prompts)
    found: dict[str, dict[str, float | None]] = {}
    for name, texts in {"empty": [""] * size, "echo": prompts, "constant": [CONSTANT] * size}.items():
        # If only the text after a mark is scored, the text is put after it.
        texts = [(suite.answer_after or "") + text for text in texts]
        ids = [encode_continuation(text, tokenizer) for text in texts]
        flat, _ = suite.score(suite.examples, texts, ids)
        found[name] = {
            score: scores.mean_of(scores.sums_of([[one] for one in flat], score)) for score in flat[0]
        }
    return found


def _unknown_note(name: str, sums: scores.Sums, bounds: tuple[float, float]) -> str:
    low, high = bounds
    return (
        f"{name} is the mean over the {int(sums[:, 1].sum()):,} of {len(sums):,} prompts whose completions "
        f"all have a score; over all prompts with a score it is from {low:.3f}, if the completions without a "
        f"score all fail, to {high:.3f}, if they all pass"
    )


def _digest(example: Example) -> str:
    """Identifies a prompt in the results of another evaluation."""
    text = json.dumps(example.prompt, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def paired(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, scores.Interval]:
    """Score -> our mean minus theirs with its 95 % interval, over the prompts that both summaries have."""
    indices: dict[str, list[int]] = {}
    for index, digest in enumerate(theirs["prompts_digest"]):
        indices.setdefault(digest, []).append(index)
    # If a prompt occurs twice, its first occurrences form one pair.
    common = [(i, indices[d].pop(0)) for i, d in enumerate(ours["prompts_digest"]) if indices.get(d)]
    found: dict[str, scores.Interval] = {}
    for name, sums in ours["per_prompt"].items():
        if common and name in theirs["per_prompt"]:
            a = scores.as_sums([sums[i] for i, _ in common])
            b = scores.as_sums([theirs["per_prompt"][name][j] for _, j in common])
            found[name] = scores.difference(a, b)
    return found

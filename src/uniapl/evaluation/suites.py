"""What can be evaluated: IFEval, IFBench, or any file of rows with any reward."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl import data
from uniapl.config import DataConfig, RewardsConfig
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder
from uniapl.rewards.base import build_rewarder
from uniapl.rewards.instructions import answer_behind, judge, read_rows
from uniapl.types import Example

BENCHMARKS = {"ifeval": "google/IFEval", "ifbench": "allenai/IFBench_test"}
"""Name -> where its prompts are on the Hub. IFEval: arXiv 2311.07911; IFBench: arXiv 2507.02833."""

Scores = Mapping[str, Sequence[float]]
"""Score -> its values for one answer: one value, or one per instruction; none where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts, and how an answer to one of them is scored.

    Example:
        Suite(name="ifeval", examples=(...), score=f, headline="prompt_strict")
        where f([example], ["text"]) == [{"prompt_strict": [0.0], "inst_strict": [1.0, 0.0], ...}]
    """

    name: str
    examples: tuple[Example, ...]
    score: Callable[[Sequence[Example], Sequence[str]], list[Scores]]
    headline: str
    """The score that the suite is known by; pass@k is of this one."""
    left_out: Mapping[str, Sequence[int]]
    """Why prompts were left out -> their row numbers."""


def parse_suite(text: str) -> tuple[str, str]:
    """`ifeval`, `NAME=PATH` or `PATH` -> (name, path or Hub id).

    Raises:
        UsageError: It is none of the three.
    """
    name, equals, path = text.partition("=")
    if equals and name and path:
        return name, path
    if not equals and text in BENCHMARKS:
        return text, BENCHMARKS[text]
    if not equals and Path(text).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return Path(text).stem, text
    raise UsageError(
        f"no suite '{text}': give {', '.join(BENCHMARKS)}, a file of rows, or NAME=PATH (a file or a Hub id)"
    )


def load_suite(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    rewards: RewardsConfig,
    *,
    functions: Sequence[Callable[..., Any]] = (),
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    max_completion_length: int = 0,
    answer_after: str | None = None,
    limit: int | None = None,
) -> Suite:
    """A suite with its prompts tokenised and its scoring tried.

    Args:
        text: As :func:`parse_suite` reads it.
        config: How prompts are read; its path is the suite's.
        rewards: The functions that score a file's answers; benchmarks, and files of theirs, have their own.
        functions: More of them, as callables.
        answer_after: What stands behind this mark is judged, by benchmarks; as for `instruction_following`.
        limit: The first so many prompts.

    Raises:
        UsageError: No such suite or file, rows that cannot be used, nothing that could score them.
    """
    name, path = parse_suite(text)
    read = config.model_copy(update={"max_prompt_length": None, "max_demonstration_length": None})
    try:
        rows = data.read_rows(config.model_copy(update={"path": path, "split": "train"}))[:limit]
        dataset = data.prepare(
            rows,
            tokenizer,
            read,
            stop_ids=stop_ids,
            context_length=context_length,
            max_completion_length=max_completion_length,
        )
        examples = dataset.examples
        if name in BENCHMARKS or (not rewards.functions and not functions):
            return Suite(
                name=name,
                examples=examples,
                score=_instruction_scores(examples, answer_after),
                headline="prompt_strict",
                left_out=dataset.left_out,
            )
        scored = build_rewarder(rewards, functions)
        scored.check_columns(examples)
        scored.check_rows(examples, allow_code=rewards.allow_code_verifiers)
    except UsageError as error:
        raise UsageError(f"suite '{name}': {error}") from error
    return Suite(
        name=name,
        examples=examples,
        score=_reward_scores(scored),
        headline="reward",
        left_out=dataset.left_out,
    )


def _instruction_scores(
    examples: Sequence[Example], answer_after: str | None
) -> Callable[[Sequence[Example], Sequence[str]], list[Scores]]:
    """IFEval's four scores, by the rows' own instructions."""
    bare = next((e.row for e in examples if e.columns.get("instruction_id_list") is None), None)
    if bare is not None:
        raise UsageError(
            f"row {bare} has no instructions ('instruction_id_list' and 'kwargs'): name reward functions "
            "that score these rows"
        )
    given = read_rows(examples)

    def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Scores]:
        return [
            _judged(given[example.row], answer_behind(text, answer_after))
            for example, text in zip(examples, texts, strict=True)
        ]

    return score


def _judged(given: Sequence[Any], text: str) -> Scores:
    scores: dict[str, list[float]] = {}
    for kind in ("strict", "loose"):
        try:
            followed = judge(given, text, loose=kind == "loose")
        except Exception:  # a checker that raises has not judged: counted as unknown
            scores |= {f"prompt_{kind}": [], f"inst_{kind}": []}
            continue
        scores[f"prompt_{kind}"] = [float(all(followed))]
        scores[f"inst_{kind}"] = [float(one) for one in followed]
    return scores


def _reward_scores(rewarder: Rewarder) -> Callable[[Sequence[Example], Sequence[str]], list[Scores]]:
    """The reward, and each function's own value where there are several."""

    def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Scores]:
        outcomes = rewarder.score(examples, texts, [(0,)] * len(texts))
        total = rewarder.combine(outcomes, len(texts))
        columns = {"reward": total}
        if len(outcomes) > 1:
            columns |= {f"rewards/{name}": outcome.values for name, outcome in outcomes.items()}
        return [
            {key: [] if values[i] is None else [float(values[i] or 0.0)] for key, values in columns.items()}
            for i in range(len(texts))
        ]

    return score

"""What can be evaluated: IFEval, IFBench, or any file of rows with any reward."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data import rows as data
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder
from uniapl.rewards.base import build_rewarder
from uniapl.rewards.checkers import Instruction
from uniapl.rewards.instructions import check_instructions, instructions_of_rows, text_after
from uniapl.types import Example

BENCHMARKS = {"ifeval": "google/IFEval", "ifbench": "allenai/IFBench_test"}
"""Name -> where its prompts are on the Hub. IFEval: arXiv 2311.07911; IFBench: arXiv 2507.02833."""

KINDS = ("strict", "loose")

Scores = Mapping[str, Sequence[float]]
"""Score -> its values for one answer: one value, or one per instruction; none where it is not known."""
Ids = Sequence[Sequence[int]]
Score = Callable[[Sequence[Example], Sequence[str], Ids], tuple[list[Scores], str | None]]
"""(examples, answers, their token ids) -> the scores of each, and the scoring's first failure, if any."""
AT_ONCE = 64
"""Answers in one call of a reward function, whose time is limited; and prompts sampled at a time."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts, and how an answer to one of them is scored.

    Examples:
        Suite(name="ifeval", examples=(...), score=f, headline="prompt_strict")
        where f([example], ["text"], [(5, 1)]) == ([{"prompt_strict": [0.0], "inst_strict": [1.0, 0.0]}],
        None)
    """

    name: str
    examples: tuple[Example, ...]
    score: Score
    headline: str
    """The score that the suite is known by; pass@k is of this one."""
    left_out: Mapping[str, Sequence[int]]
    """Why prompts were left out -> their row numbers."""
    notes: Sequence[str] = ()
    """What the reward functions say of the rows."""
    answer_after: str | None = None
    """The mark behind which an answer begins, where only what follows it is judged."""


def parse_suite(text: str) -> tuple[str, str]:
    """`ifeval`, `NAME=PATH` or `PATH` -> (name, path or Hub id).

    Raises:
        UsageError: It is none of the three.
    """
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name:
        return name, path
    if not equals and text in BENCHMARKS:
        return text, BENCHMARKS[text]
    if "=" not in Path(text).name and Path(text).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return Path(text).stem, text
    raise UsageError(
        f"no suite '{text}': give {', '.join(BENCHMARKS)}, a file of rows, or NAME=PATH (a file or a Hub id)"
    )


def load_suites(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    functions: Sequence[Callable[..., Any]] = (),
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
) -> tuple[Suite, ...]:
    """All suites of `evaluation.suites`; see `load_suite`.

    Raises:
        UsageError: Two have the same name; or what load_suite raises.
    """
    names = [parse_suite(text)[0] for text in config.evaluation.suites]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two suites are called '{twice[0]}': give one another name, by NAME=PATH")
    return tuple(
        load_suite(
            text, config, tokenizer, functions=functions, stop_ids=stop_ids, context_length=context_length
        )
        for text in config.evaluation.suites
    )


def load_suite(
    text: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    functions: Sequence[Callable[..., Any]] = (),
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
) -> Suite:
    """A suite with its prompts tokenised and its scoring tried.

    Args:
        text: As `parse_suite` reads it.
        config: `data` says how prompts are read, `rewards` what scores a file's answers (benchmarks, and
            files of their form where there are no rewards, have IFEval's scores), `evaluation` the rest.
        functions: More reward functions, as callables.

    Raises:
        UsageError: No such suite or file, rows that cannot be used, nothing that could score them.
    """
    name, path = parse_suite(text)
    whole = {"path": path, "split": "train", "max_prompt_length": None, "max_demonstration_length": None}
    read, rewards = config.data.model_copy(update=whole), config.rewards
    try:
        with data.named_source(path):
            dataset = data.tokenize_rows(
                data.read_rows(read)[: config.evaluation.limit],
                tokenizer,
                read,
                stop_ids=stop_ids,
                context_length=context_length,
                max_completion_length=config.evaluation.max_completion_length,
            )
        examples, notes = dataset.examples, []
        if name in BENCHMARKS or (not rewards.functions and not functions):
            score = _instruction_scores(examples, config.evaluation.answer_after)
            headline = "prompt_strict"
        else:
            rewarder = build_rewarder(rewards, functions)
            rewarder.check_columns(examples)
            notes = rewarder.check_rows(examples, allow_code=rewards.allow_code_verifiers)
            rewarder.try_out(examples)
            score, headline = _reward_scores(rewarder), "reward"
    except UsageError as error:
        key = "evaluation." if str(error).startswith("max_completion_length") else ""
        raise UsageError(f"suite '{name}': {key}{error}") from error
    return Suite(
        name=name,
        examples=examples,
        score=score,
        headline=headline,
        left_out=dataset.left_out,
        notes=tuple(notes),
        answer_after=config.evaluation.answer_after if headline == "prompt_strict" else None,
    )


def _instruction_scores(examples: Sequence[Example], answer_after: str | None) -> Score:
    """IFEval's four scores, by the rows' own instructions."""
    bare = next((e.row for e in examples if e.columns.get("instruction_id_list") is None), None)
    if bare is not None:
        raise UsageError(
            f"row {bare} has no instructions ('instruction_id_list' and 'kwargs'): name reward functions "
            "that score these rows"
        )
    given = instructions_of_rows(examples)

    def score(examples: Sequence[Example], texts: Sequence[str], ids: Ids) -> tuple[list[Scores], str | None]:
        judged: list[Scores] = []
        failure: str | None = None
        for example, text in zip(examples, texts, strict=True):
            answer = text_after(text, answer_after)
            try:
                judged.append(_judged(given[example.row], answer))
            except Exception as error:  # a checker that raises has not judged: counted as unknown
                failure = failure or f"{type(error).__name__}: {error}"
                judged.append({f"{level}_{kind}": [] for kind in KINDS for level in ("prompt", "inst")})
        return judged, failure

    return score


def _judged(given: Sequence[Instruction], text: str) -> Scores:
    scores: dict[str, list[float]] = {}
    for kind in KINDS:
        followed = check_instructions(given, text, loose=kind == "loose")
        scores[f"prompt_{kind}"] = [float(all(followed))]
        scores[f"inst_{kind}"] = [float(one) for one in followed]
    return scores


def _reward_scores(rewarder: Rewarder) -> Score:
    """The reward, and each function's own value where there are several."""

    def score(examples: Sequence[Example], texts: Sequence[str], ids: Ids) -> tuple[list[Scores], str | None]:
        found: list[Scores] = []
        failure: str | None = None
        for start in range(0, len(texts), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            outcomes = rewarder.score(examples[some], texts[some], ids[some])
            columns = {"reward": rewarder.combine(outcomes, len(texts[some]))}
            if len(outcomes) > 1:
                columns |= {f"rewards/{name}": outcome.values for name, outcome in outcomes.items()}
            for name, outcome in outcomes.items():
                if outcome.message is not None:
                    failure = failure or f"reward '{name}': {outcome.message}"
            for place in range(len(texts[some])):
                values = {key: column[place] for key, column in columns.items()}
                found.append({key: [] if value is None else [float(value)] for key, value in values.items()})
        return found, failure

    return score

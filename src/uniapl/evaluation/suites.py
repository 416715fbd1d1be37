"""Suites of prompts with their scoring: IFEval, IFBench, or any file of rows with reward functions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState

from uniapl.config import Config, RewardFunctionConfig, RewardsConfig
from uniapl.data.parsing import NumberedRow
from uniapl.data.reading import FILE_TYPES, named_source, read_rows
from uniapl.data.rows import tokenize_rows
from uniapl.errors import UsageError
from uniapl.rewards import Rewarder
from uniapl.rewards.base import Once, build_rewarder, here
from uniapl.rewards.calls import Completion
from uniapl.rewards.instructions import check_instructions, instructions_of_rows, text_after
from uniapl.tools.functions import find_tools
from uniapl.types import Example

BENCHMARKS = {"ifeval": "google/IFEval", "ifbench": "allenai/IFBench_test"}
"""Name -> Hub id of the prompts. IFEval: arXiv 2311.07911; IFBench: arXiv 2507.02833."""
INSTRUCTION_SCORES = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose")

Scores = Mapping[str, Sequence[float]]
"""Score -> its values for one completion: one, or one per instruction; none if the score is unknown."""
Ids = Sequence[Sequence[int]]
Score = Callable[[Sequence[Example], Sequence[Completion], Ids], tuple[list[Scores], str | None]]
"""(examples, completions, their token ids) -> the scores of each completion, and the first failure."""
BATCH_SIZE = 64
"""Completions in one call of a reward function, which has a time limit; also prompts sampled at a time."""
UNLIMITED = ("max_prompt_length", "max_demonstration_length")
"""Keys of `data` that leave out rows of the training data only."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts, and the function that scores completions of them.

    Examples:
        Suite(name="ifeval", examples=(...), score=f, headline="prompt_strict")
        where f([example], ["text"], [(5, 1)]) == ([{"prompt_strict": [0.0], "inst_strict": [1.0, 0.0]}],
        None)
    """

    name: str
    examples: tuple[Example, ...]
    score: Score
    headline: str
    """The main score, of which pass@k is computed."""
    left_out: Mapping[str, Sequence[int]]
    """Reason -> row numbers of the prompts left out."""
    notes: Sequence[str] = ()
    """Notes on the rows."""
    answer_after: str | None = None
    """If not None, only the text after this mark is scored."""


def parse_suite(text: str) -> tuple[str, str]:
    """`ifeval`, `NAME=PATH` or `PATH` -> (name, path or Hub id).

    Raises:
        UsageError: The text has none of these forms.
    """
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name:
        return name, path
    if not equals and text in BENCHMARKS:
        return text, BENCHMARKS[text]
    if "=" not in Path(text).name and text.endswith(FILE_TYPES):
        return Path(text.removesuffix(".gz")).stem, text
    raise UsageError(
        f"unknown suite '{text}': use {', '.join(BENCHMARKS)}, a file, or NAME=PATH (a file or Hub id)"
    )


def load_suites(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    functions: Sequence[Callable[..., Any]] = (),
    stop_ids: Collection[int] = (),
    context_length: int | None = None,
    state: TrainerState | None = None,
    once: Once = here,
    rows: Mapping[str, Sequence[NumberedRow]] | None = None,
) -> tuple[Suite, ...]:
    """The suites of `evaluation.suites`, with their prompts tokenised and their scoring tried.

    Args:
        config: `data` determines how prompts are read, and `rewards` how a file's completions are scored.
            Benchmarks, and files in their format without reward functions, are scored as by IFEval.
        functions: Further reward functions, as callables.
        stop_ids: Tokens at which the sampler ends a completion.
        context_length: The model's context length in tokens; longer prompts are left out.
        state: The `trainer_state` of reward functions; None: the state at the end of a run.
        once: Tries the scoring in one of several processes.
        rows: Suites in place of the configured ones, as name -> numbered rows. No function needs to apply to
            their rows.

    Raises:
        UsageError: A suite does not exist, two have the same name, its rows are invalid or cannot be scored.
    """
    sources = [parse_suite(text) for text in config.evaluation.suites]
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two suites are called '{name}': rename one with NAME=PATH")
    state = state or TrainerState(global_step=config.max_steps, max_steps=config.max_steps)
    suites: list[Suite] = []
    for name, path in sources if rows is None else [(name, None) for name in rows]:
        settings = config.data.model_copy(update=dict.fromkeys(UNLIMITED))
        if path is not None:
            settings = settings.model_copy(
                update={"path": path, "split": "train", "name": None, "revision": None}
            )
        try:
            found = read_rows(settings) if rows is None else rows[name]
            with named_source(found):
                dataset = tokenize_rows(
                    found[: config.evaluation.limit],
                    tokenizer,
                    settings,
                    stop_ids=stop_ids,
                    context_length=context_length,
                    max_completion_length=config.evaluation.max_completion_length,
                    tools=[dict(tool.schema) for tool in find_tools(config.rollout.tools)],
                )
            scoring = _scoring(name, dataset.examples, config, functions, state, once, required=rows is None)
        except UsageError as error:
            key = "evaluation." if str(error).startswith("max_completion_length") else ""
            raise UsageError(f"suite '{name}': {key}{error}") from error
        suites.append(
            Suite(
                name=name,
                examples=dataset.examples,
                score=scoring.score,
                headline=scoring.headline,
                left_out=dataset.left_out,
                notes=(*dataset.notes, *scoring.notes),
                answer_after=scoring.answer_after,
            )
        )
    return tuple(suites)


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """How completions of a suite are scored."""

    score: Score
    headline: str
    notes: Sequence[str] = ()
    answer_after: str | None = None


def _scoring(
    name: str,
    examples: Sequence[Example],
    config: Config,
    functions: Sequence[Callable[..., Any]],
    state: TrainerState,
    once: Once,
    *,
    required: bool,
) -> _Scoring:
    """The scoring by rewards or instructions, extended by `evaluation.metrics`.

    Args:
        required: It is an error if no function applies to a row.
    """
    measured = RewardsConfig(
        functions=tuple(RewardFunctionConfig(name=metric) for metric in config.evaluation.metrics),
        timeout=config.rewards.timeout,
    )
    metrics = build_rewarder(measured, (), state, once=once)
    rewarder = build_rewarder(config.rewards, functions, state, once=once)
    instructed = any(example.columns.get("instruction_id_list") is not None for example in examples)
    # Without anything else that scores the rows, the error says which row has no instructions.
    instructed = instructed or (required and not metrics.rewards)
    if name in BENCHMARKS or (instructed and not rewarder.rewards):
        mark = config.evaluation.answer_after
        score = _instruction_scores(examples, mark, once)
        found = _Scoring(score=score, headline="prompt_strict", answer_after=mark)
    elif rewarder.rewards:
        if required:
            rewarder.check_columns(examples)
        notes = rewarder.check_rows(examples, allow_code=config.rewards.allow_code_verifiers)
        rewarder.try_out(examples)
        found = _Scoring(score=_reward_scores(rewarder), headline="reward", notes=notes)
    else:
        found = _Scoring(score=_no_scores, headline="reward")
    return _with_metrics(found, metrics, examples) if metrics.rewards else found


def _no_scores(
    examples: Sequence[Example], texts: Sequence[Completion], ids: Ids
) -> tuple[list[Scores], str | None]:
    return [{"reward": []} for _ in texts], None


def _with_metrics(scoring: _Scoring, metrics: Rewarder, examples: Sequence[Example]) -> _Scoring:
    """The scoring with a score per metric, under the name of its function."""
    names = {reward.name: reward.name.rpartition(":")[2] for reward in metrics.rewards}
    if len(set(names.values())) < len(names):
        raise UsageError(f"evaluation.metrics: two functions have the same name: {', '.join(names)}")
    metrics.try_out(examples)
    first = metrics.rewards[0]

    def score(
        examples: Sequence[Example], texts: Sequence[Completion], ids: Ids
    ) -> tuple[list[Scores], str | None]:
        found, failure = scoring.score(examples, texts, ids)
        for start in range(0, len(texts), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            for name, outcome in metrics.score(examples[batch], texts[batch], ids[batch]).items():
                if outcome.message is not None:
                    failure = failure or f"metric '{name}': {outcome.message}"
                for at, value in enumerate(outcome.values, start=start):
                    found[at] = {**found[at], names[name]: [] if value is None else [float(value)]}
        return found, failure

    applying = [reward.name for reward in metrics.rewards if any(map(reward.applies_to, examples))]
    notes = [f"metric '{name}' applies to no row" for name in names if name not in applying]
    headline = names[first.name] if first.name in applying else scoring.headline
    return replace(scoring, score=score, headline=headline, notes=(*scoring.notes, *notes))


def _instruction_scores(examples: Sequence[Example], answer_after: str | None, once: Once) -> Score:
    """IFEval's four scores, from the instructions in the rows."""
    bare = next((e.row for e in examples if e.columns.get("instruction_id_list") is None), None)
    if bare is not None:
        raise UsageError(
            f"row {bare} has no instructions ('instruction_id_list' and 'kwargs'): name reward functions "
            "or evaluation.metrics that score these rows"
        )
    given = once(lambda: instructions_of_rows(examples))

    def score(
        examples: Sequence[Example], texts: Sequence[Completion], ids: Ids
    ) -> tuple[list[Scores], str | None]:
        found: list[Scores] = []
        failure: str | None = None
        for example, text in zip(examples, texts, strict=True):
            values: dict[str, list[float]] = {name: [] for name in INSTRUCTION_SCORES}
            try:
                # Of a trajectory, the last turn is the answer.
                last = text if isinstance(text, str) else str(text[-1]["content"])
                answer = text_after(last, answer_after)
                strict, loose = (
                    check_instructions(given[example.row], answer, loose=loose) for loose in (False, True)
                )
                values["prompt_strict"], values["inst_strict"] = [float(all(strict))], [*map(float, strict)]
                values["prompt_loose"], values["inst_loose"] = [float(all(loose))], [*map(float, loose)]
            except Exception as error:  # a checker that raises gives no score
                failure = failure or f"{type(error).__name__}: {error}"
            found.append(values)
        return found, failure

    return score


def _reward_scores(rewarder: Rewarder) -> Score:
    """The reward, and the value of each function if there are several."""

    def score(
        examples: Sequence[Example], texts: Sequence[Completion], ids: Ids
    ) -> tuple[list[Scores], str | None]:
        found: list[Scores] = []
        failure: str | None = None
        for start in range(0, len(texts), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            outcomes = rewarder.score(examples[batch], texts[batch], ids[batch])
            columns = {"reward": rewarder.combine(outcomes, len(texts[batch]))}
            for name, outcome in outcomes.items():
                if len(outcomes) > 1:
                    columns[f"rewards/{name}"] = outcome.values
                if outcome.message is not None:
                    failure = failure or f"reward '{name}': {outcome.message}"
            for row in zip(*columns.values(), strict=True):
                values = zip(columns, row, strict=True)
                found.append({name: [] if value is None else [float(value)] for name, value in values})
        return found, failure

    return score

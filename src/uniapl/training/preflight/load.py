"""Load and check the inputs of a run before its first step."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState

from uniapl.config import Config, EvaluationConfig, RolloutConfig
from uniapl.config.resolve import Resolved
from uniapl.data.parsing import NumberedRow
from uniapl.data.reading import Rows, named_source, number_rows, read_rows
from uniapl.data.rows import Dataset, unused_columns
from uniapl.data.tokenization import ordinary_tokens
from uniapl.errors import UsageError
from uniapl.evaluation import Suite, load_suites
from uniapl.models.generation import token_ids, unused_generation_settings
from uniapl.models.loading import (
    ModelSource,
    check_vocabulary_size,
    load_model_config,
    load_stop_ids,
    load_tokenizer,
)
from uniapl.rewards import Rewarder
from uniapl.rewards.base import Once, build_rewarder, here
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.build_sampler import Tooling
from uniapl.training.build_teacher import check_teacher, notes_on_teacher
from uniapl.training.given import Given
from uniapl.training.inputs import RunInputs
from uniapl.training.preflight.checks import (
    check_recipe,
    check_stage,
    check_tokens,
    notes_on_adversary,
    notes_on_lengths,
    notes_on_pairs,
    notes_on_selection,
)
from uniapl.training.preflight.epochs import with_max_steps
from uniapl.types import Example


def load_inputs(
    resolved: Resolved,
    stages: Sequence[Resolved],
    given: Given | None = None,
    *,
    with_suites: bool = True,
    once: Once = here,
) -> RunInputs:
    """Tokenizer, data, reward functions and suites, checked against what the stages need.

    Args:
        once: Makes the checks that call reward functions, in one of several processes.

    Raises:
        UsageError: Any error that would otherwise stop the run later.
    """
    given, config = given or Given(), resolved.config
    check_recipe(config, [stage.config for stage in stages], has_rows=given.eval_dataset is not None)
    model_source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(model_source)
    model_config = load_model_config(model_source)
    check_vocabulary_size(getattr(model_config.get_text_config(), "vocab_size", len(tokenizer)), tokenizer)
    rows = _rows(given, config)
    stop_ids = load_stop_ids(model_source, model_config, tokenizer)
    window = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    limits = {"stop_ids": stop_ids, "context_length": window}
    tooling = Tooling.of(config, tokenizer, stop_ids)
    longest = [s.config.rollout.max_completion_length for s in stages if s.config.objective.uses_rollouts]
    with named_source(rows):
        limit = {"max_completion_length": max(longest, default=0)}
        dataset = tooling.toolset.tokenize(rows, tokenizer, config.data, once=once, **limit, **limits)
        unknown = check_tokens(tokenizer, dataset, stop_ids)
    state = _trainer_state(config)
    tools, functions = tooling.toolset, [*given.functions, *tooling.toolset.rewards]
    rewarder = build_rewarder(config.rewards, functions, state, once=once, start=tools.instances)
    notes = [*dataset.notes, *_data_notes(rows, config, stop_ids, tokenizer)]
    notes += _notes_on_strings(resolved, tokenizer, dataset.examples)
    if longest:
        rewarder.check_columns(dataset.examples)
        with named_source(rows):
            notes += rewarder.check_rows(dataset.examples, allow_code=config.rewards.allow_code_verifiers)
    # Their number of steps depends on the rows that a reward function applies to.
    stages = [with_max_steps(stage, dataset, rewarder) for stage in stages]
    state.max_steps = sum(stage.config.max_steps for stage in stages)
    for stage in stages:
        check_stage(stage.config, dataset, rewarder, notes)
        check_teacher(stage.config, tokenizer, dataset.examples)
    configs = [stage.config for stage in stages]
    notes += _sampling_notes(configs, model_source, stop_ids, tokenizer)
    notes += unknown + _notes_on_stages(configs, dataset, rewarder)
    if longest:
        rewarder.try_out(dataset.examples)
    scoring: dict[str, Any] = {"state": state, "once": once, **limits}
    suites = _load_suites(config, tokenizer, given, **scoring) if with_suites else ()
    notes += _notes_on_suites(resolved, tokenizer, suites)
    return RunInputs(
        source=model_source,
        tokenizer=tokenizer,
        dataset=dataset,
        rewarder=rewarder,
        stop_ids=stop_ids,
        tools=tools.tools,
        environment=tools.environment,
        data_sha256=_sha256([row for _, row in rows]),
        notes=tuple(notes),
        suites=suites,
    )


def _rows(given: Given, config: Config) -> list[NumberedRow]:
    own = given.train_dataset
    return read_rows(config.data) if own is None else number_rows(own, config.data)


def _notes_on_stages(stages: Sequence[Config], dataset: Dataset, rewarder: Rewarder) -> list[str]:
    of_adversary = notes_on_adversary(stages, dataset, rewarder)
    of_selection = notes_on_selection(stages, dataset, rewarder)
    unused = [*notes_on_teacher(stages), *notes_on_pairs(stages, dataset)]
    return [*notes_on_lengths(stages, dataset), *of_adversary, *unused, *of_selection]


def _load_suites(
    config: Config, tokenizer: PreTrainedTokenizerBase, given: Given, **scoring: Any
) -> tuple[Suite, ...]:
    """The suites of the recipe, and those given to :func:`uniapl.train`."""
    scoring["functions"] = given.functions
    suites = load_suites(config, tokenizer, **scoring)
    if own := given.suites(config):
        suites += load_suites(config, tokenizer, rows=own, **scoring)
    names = [suite.name for suite in suites]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            f"two suites are called '{repeated[0]}': give eval_dataset as a mapping of names to rows"
        )
    return suites


def _sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    content = json.dumps(rows, default=repr, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _data_notes(
    rows: Sequence[tuple[int, Any]],
    config: Config,
    stop_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    chosen = token_ids(config.model.stop_tokens, tokenizer)
    notes = [
        f"the end token {token} ({tokenizer.decode(token)!r}) in generation_config.json is ordinary text: "
        "every completion ends there"
        for token in ordinary_tokens({*stop_ids}.difference(chosen), tokenizer)
    ]
    return notes + unused_columns(rows, config.data) + list(rows.notes if isinstance(rows, Rows) else ())


def _notes_on_suites(
    resolved: Resolved, tokenizer: PreTrainedTokenizerBase, suites: Sequence[Suite]
) -> list[str]:
    return [
        f"suite '{suite.name}': {note}"
        for suite in suites
        for note in [*suite.notes, *_notes_on_strings(resolved, tokenizer, suite.examples)]
    ]


def _notes_on_strings(
    resolved: Resolved, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[str]:
    """A note on string prompts that do not get the model's chat template, unless the user chose this."""
    if not tokenizer.chat_template or resolved.sources["data.prompt_format"] != "default":
        return []
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.bos_token]
    texts = [example.prompt for example in examples if isinstance(example.prompt, str)]
    # A prompt with special tokens was rendered by the user.
    count = sum(not any(token in text for token in special) for text in texts)
    if not count:
        return []
    return [
        f"{count} of {len(examples)} prompts are strings, and the model reads them verbatim, without its "
        "chat template: set data.prompt_format to chat to make each one a user message, or to text to keep "
        "them without this note"
    ]


def _sampling_notes(
    stages: Sequence[Config],
    source: ModelSource,
    stop_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """What of the model's own settings is not used. The settings of sampling are made once, to check them."""
    for config in stages:
        SamplingSettings.of_rollouts(config, stop_ids, tokenizer)
        SamplingSettings.of_evaluation(config, stop_ids, tokenizer)
    used: list[RolloutConfig | EvaluationConfig] = [
        config.rollout for config in stages if config.objective.uses_rollouts
    ]
    used += [config.evaluation for config in stages[:1] if config.evaluation.suites]
    return unused_generation_settings(source.base, source.revision, used)


def _trainer_state(config: Config) -> TrainerState:
    """What reward functions read from `trainer_state` before the first step, except for `max_steps`."""
    return TrainerState(
        logging_steps=config.logging_steps,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
    )

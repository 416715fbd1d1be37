"""Load and check the inputs of a run before its first step."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from uniapl.config.resolve import Resolved
from uniapl.data.reading import named_source, read_rows
from uniapl.data.rows import tokenize_rows
from uniapl.evaluation import Suite, load_suites
from uniapl.models.loading import ModelSource, load_model_config, load_stop_ids, load_tokenizer
from uniapl.rewards.base import Once, build_rewarder, here
from uniapl.training.inputs import RunInputs
from uniapl.training.preflight.checks import check_recipe, check_stage


def load_inputs(
    resolved: Resolved,
    stages: Sequence[Resolved],
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = (),
    with_suites: bool = True,
    once: Once = here,
) -> RunInputs:
    """Tokenizer, data, reward functions and suites, checked against what the stages need.

    Args:
        once: Makes the checks that call reward functions, in one of several processes.

    Raises:
        UsageError: Any error that would otherwise stop the run later.
    """
    config = resolved.config
    check_recipe(config)
    model_source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(model_source)
    model_config = load_model_config(model_source)
    rows = read_rows(config.data) if train_dataset is None else list(enumerate(train_dataset, start=1))
    stop_ids = load_stop_ids(model_source, model_config, tokenizer)
    context_length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    data_source = config.data.path if train_dataset is None else None
    longest = [s.config.rollout.max_completion_length for s in stages if s.config.objective.uses_rollouts]
    with named_source(data_source):
        dataset = tokenize_rows(
            rows,
            tokenizer,
            config.data,
            stop_ids=stop_ids,
            context_length=context_length,
            max_completion_length=max(longest, default=0),
        )
    functions = [reward_functions] if callable(reward_functions) else reward_functions
    rewarder = build_rewarder(config.rewards, functions, once=once)
    notes: list[str] = []
    if longest:
        rewarder.check_columns(dataset.examples)
        with named_source(data_source):
            notes = rewarder.check_rows(dataset.examples, allow_code=config.rewards.allow_code_verifiers)
    for stage in stages:
        check_stage(stage.config, dataset, rewarder, notes)
    if longest:
        rewarder.try_out(dataset.examples)
    suites: tuple[Suite, ...] = ()
    if with_suites:
        limits = {"stop_ids": stop_ids, "context_length": context_length}
        suites = load_suites(config, tokenizer, functions=functions, once=once, **limits)
        notes += [f"suite '{suite.name}': {note}" for suite in suites for note in suite.notes]
    return RunInputs(
        source=model_source,
        tokenizer=tokenizer,
        dataset=dataset,
        rewarder=rewarder,
        stop_ids=stop_ids,
        data_sha256=_sha256([row for _, row in rows]),
        notes=tuple(notes),
        suites=suites,
    )


def _sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    content = json.dumps(rows, default=repr, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

"""Measure a model on held-out questions of the demo task with tools."""

from dataclasses import dataclass
from pathlib import Path

from uniapl.config import Config
from uniapl.data.batching import demonstration_rows
from uniapl.demo.measure import nll_of
from uniapl.demo.tools import ToolTask, as_row
from uniapl.evaluation import evaluate_suite, load_suites
from uniapl.models.loading import (
    ModelSource,
    load_model,
    load_model_config,
    load_stop_ids,
    load_tokenizer,
    pad_id_of,
)
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.build_sampler import Tooling, with_tools
from uniapl.types import Rollout


@dataclass(frozen=True, kw_only=True)
class ToolMeasurement:
    """Measurements of one trajectory per question, sampled at temperature 1."""

    solved: float
    """Fraction of trajectories that end with the right answer."""
    calls: float
    """Executed tool calls per trajectory."""
    malformed: float
    """Fraction of trajectories that end with a call that cannot be read."""
    unanswered: float
    """Fraction of trajectories that do not end with an answer."""
    expert_nll: float
    """Nats per token of the expert's turns under the model."""


def measure_tools(path: Path, config: Config, task: ToolTask) -> tuple[ToolMeasurement, list[str]]:
    """Sample one trajectory per held-out question and measure the trajectories.

    Args:
        path: Directory of the model.
        config: The recipe of the task.

    Returns:
        The measurement, and each trajectory as text, one turn or result per line.
    """
    source = ModelSource(base=str(path))
    model, tokenizer = load_model(source), load_tokenizer(source)
    stop_ids = load_stop_ids(source, load_model_config(source), tokenizer)
    rows = [(n, as_row(question, solved=True)) for n, question in enumerate(task.held_out, start=1)]
    (suite,) = load_suites(config, tokenizer, stop_ids=stop_ids, rows={"held_out": rows})
    settings = SamplingSettings.of_evaluation(config, stop_ids, tokenizer)
    sampler = with_tools(
        LocalSampler(model=model, settings=settings, pad_id=pad_id_of(tokenizer)),
        config,
        Tooling.of(config, tokenizer, stop_ids),
        settings.max_completion_length,
    )
    result = evaluate_suite(suite, sampler, tokenizer, seed=config.seed, with_floors=False)
    expert = [row for example in suite.examples for row in demonstration_rows(example)]
    metrics = result.metrics
    measurement = ToolMeasurement(
        solved=metrics["solved"],
        calls=metrics["tools/call_frequency"],
        malformed=metrics["tools/malformed"],
        unanswered=1 - metrics["answered"],
        expert_nll=nll_of(model, expert, pad_id_of(tokenizer)),
    )
    return measurement, [_lines(rollout) for rollout in result.rollouts]


def _lines(rollout: Rollout) -> str:
    marks = {"assistant": "", "tool": "-> "}
    lines = [f"    {marks[message['role']]}{message['content']}" for message in rollout.messages]
    return "\n".join(["", *lines])
